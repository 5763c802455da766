"""Attribution methods, one file each: `METHODS["trak"](dim=2048, seed=0)`."""

from typing import Any

from hf_attribution.catalogue import Catalogue
from hf_attribution.methods.base import GradientMethod, Method, Scored
from hf_attribution.methods.bm25 import BM25
from hf_attribution.methods.datainf import DataInf
from hf_attribution.methods.diagonal import Diagonal
from hf_attribution.methods.ekfac import EKFac
from hf_attribution.methods.grad_cos import GradCos
from hf_attribution.methods.grad_dot import GradDot
from hf_attribution.methods.influence import Influence
from hf_attribution.methods.kfac import KFac
from hf_attribution.methods.knn_shapley import KNNShapley
from hf_attribution.methods.label_match import LabelMatch
from hf_attribution.methods.logra import LoGra
from hf_attribution.methods.random import Random
from hf_attribution.methods.representation_similarity import RepresentationSimilarity
from hf_attribution.methods.representer import Representer
from hf_attribution.methods.smoothed_unroll import SmoothedUnroll
from hf_attribution.methods.source import Source
from hf_attribution.methods.tracin import TracIn
from hf_attribution.methods.tracin_ideal import TracInIdeal
from hf_attribution.methods.trackstar import TrackStar
from hf_attribution.methods.trak import Trak
from hf_attribution.methods.unroll import Unroll

METHODS: Catalogue[Method] = Catalogue(
    "method",
    (
        Random,
        LabelMatch,
        BM25,
        RepresentationSimilarity,
        KNNShapley,
        Representer,
        GradDot,
        GradCos,
        TracIn,
        TracInIdeal,
        Source,
        Trak,
        LoGra,
        TrackStar,
        Influence,
        Diagonal,
        KFac,
        EKFac,
        DataInf,
        Unroll,
        SmoothedUnroll,
    ),
)


def get_method(method: str | Method, **settings: Any) -> Method:
    """A method by name, with settings.

    Args:
        method: A name in `METHODS`, or a method, whose settings are replaced.
        **settings: Fields of the method.

    Returns:
        The method.

    Raises:
        KeyError: If there is none of that name; the message suggests the nearest.
        TypeError: If it has no such setting; the message lists those it has.

    Example:
        >>> get_method("trak", dim=512).dim
        512
    """
    return METHODS.make(method, settings)


__all__ = [
    "BM25",
    "METHODS",
    "DataInf",
    "Diagonal",
    "EKFac",
    "GradCos",
    "GradDot",
    "GradientMethod",
    "Influence",
    "KFac",
    "KNNShapley",
    "LabelMatch",
    "LoGra",
    "Method",
    "Random",
    "RepresentationSimilarity",
    "Representer",
    "Scored",
    "SmoothedUnroll",
    "Source",
    "TracIn",
    "TracInIdeal",
    "TrackStar",
    "Trak",
    "Unroll",
    "get_method",
]
