"""Retraining on subsets of the training data: the ground truth that scores are judged by."""

from hf_attribution.retraining.plan import Plan, Request, make_plan
from hf_attribution.retraining.recipe import Recipe
from hf_attribution.retraining.runs import run_plan, train_and_measure

__all__ = ["Plan", "Recipe", "Request", "make_plan", "run_plan", "train_and_measure"]
