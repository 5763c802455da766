"""Training data attribution for Hugging Face models, measured by retraining.

    trainer = AttributionTrainer(model=model, args=args, train_dataset=train, eval_dataset=test)
    trainer.train()
    scores = trainer.attribute(test, method="trak")
    truth = trainer.retrain(num_subsets=100, fraction=0.5, seeds=2)
    evaluate_lds(scores, truth, train)

Importing the package registers its metrics with `evaluate`, so that `evaluate.load("lds")` works offline, and imports
neither torch nor transformers: names are imported when they are first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

from hf_attribution.metric_cache import metric_path, register_metrics

if TYPE_CHECKING:
    from hf_attribution.attribution import attribute, attribute_parts, attribute_top, self_influence
    from hf_attribution.counterfactuals import Counterfactuals, Subsets
    from hf_attribution.debugging import find_duplicates, find_mislabeled, select_subset
    from hf_attribution.dry_run import attribute_dry_run
    from hf_attribution.ensemble import Ensemble
    from hf_attribution.estimation import (
        AME,
        ESTIMATORS,
        LOO,
        Banzhaf,
        Datamodel,
        Shapley,
        SubsampledInfluence,
        estimate,
    )
    from hf_attribution.evaluation import LDSReport, evaluate_lds
    from hf_attribution.hub.card import AttributionCardData
    from hf_attribution.methods import (
        BM25,
        METHODS,
        DataInf,
        Diagonal,
        EKFac,
        GradCos,
        GradDot,
        Influence,
        KFac,
        KNNShapley,
        LabelMatch,
        LoGra,
        Random,
        RepresentationSimilarity,
        Representer,
        SmoothedUnroll,
        Source,
        TracIn,
        TracInIdeal,
        TrackStar,
        Trak,
        Unroll,
    )
    from hf_attribution.part_scores import PartScores
    from hf_attribution.problem import Checkpoint
    from hf_attribution.report.comparison import compare
    from hf_attribution.report.page import write_report
    from hf_attribution.report.plots import plot_cost, plot_lds, plot_top
    from hf_attribution.scores import Scores
    from hf_attribution.store import FeatureStore
    from hf_attribution.studies import brittleness, removal_curve, stability
    from hf_attribution.tasks import infer_task
    from hf_attribution.top_scores import TopScores
    from hf_attribution.trainer import AttributionMixin, AttributionTrainer
    from hf_attribution.tuning import CrossFit, choose, cross_fit

__version__ = "0.1.0"

_MODULES = {
    "attribution": ("attribute", "attribute_parts", "attribute_top", "self_influence"),
    "dry_run": ("attribute_dry_run",),
    "counterfactuals": ("Counterfactuals", "Subsets"),
    "debugging": ("find_duplicates", "find_mislabeled", "select_subset"),
    "ensemble": ("Ensemble",),
    "estimation": (
        "AME",
        "ESTIMATORS",
        "LOO",
        "Banzhaf",
        "Datamodel",
        "Shapley",
        "SubsampledInfluence",
        "estimate",
    ),
    "evaluation": ("LDSReport", "evaluate_lds"),
    "hub.card": ("AttributionCardData",),
    "methods": (
        "BM25",
        "METHODS",
        "DataInf",
        "Diagonal",
        "EKFac",
        "GradCos",
        "GradDot",
        "Influence",
        "KNNShapley",
        "KFac",
        "LabelMatch",
        "LoGra",
        "Random",
        "RepresentationSimilarity",
        "Representer",
        "SmoothedUnroll",
        "Source",
        "TracIn",
        "TracInIdeal",
        "TrackStar",
        "Trak",
        "Unroll",
    ),
    "part_scores": ("PartScores",),
    "problem": ("Checkpoint",),
    "report.comparison": ("compare",),
    "report.page": ("write_report",),
    "report.plots": ("plot_cost", "plot_lds", "plot_top"),
    "scores": ("Scores",),
    "studies": ("brittleness", "removal_curve", "stability"),
    "store": ("FeatureStore",),
    "tasks": ("infer_task",),
    "top_scores": ("TopScores",),
    "trainer": ("AttributionMixin", "AttributionTrainer"),
    "tuning": ("CrossFit", "choose", "cross_fit"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "AME",
    "BM25",
    "ESTIMATORS",
    "LOO",
    "METHODS",
    "AttributionCardData",
    "AttributionMixin",
    "AttributionTrainer",
    "Banzhaf",
    "Checkpoint",
    "Counterfactuals",
    "CrossFit",
    "DataInf",
    "Datamodel",
    "Diagonal",
    "EKFac",
    "Ensemble",
    "FeatureStore",
    "GradCos",
    "GradDot",
    "Influence",
    "KFac",
    "KNNShapley",
    "LDSReport",
    "LabelMatch",
    "LoGra",
    "PartScores",
    "Random",
    "RepresentationSimilarity",
    "Representer",
    "Scores",
    "Shapley",
    "SmoothedUnroll",
    "Source",
    "SubsampledInfluence",
    "Subsets",
    "TopScores",
    "TracIn",
    "TracInIdeal",
    "TrackStar",
    "Trak",
    "Unroll",
    "attribute",
    "attribute_dry_run",
    "attribute_parts",
    "attribute_top",
    "brittleness",
    "choose",
    "compare",
    "cross_fit",
    "estimate",
    "evaluate_lds",
    "find_duplicates",
    "find_mislabeled",
    "infer_task",
    "metric_path",
    "plot_cost",
    "plot_lds",
    "plot_top",
    "removal_curve",
    "select_subset",
    "self_influence",
    "stability",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'hf_attribution' has no attribute {name!r}")
    return getattr(importlib.import_module(f"hf_attribution.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)


register_metrics()
