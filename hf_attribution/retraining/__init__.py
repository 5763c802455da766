"""Retraining on subsets of the training data: the ground truth that scores are judged by."""

from hf_attribution.retraining.plan import FollowUp, Plan, Request, make_plan
from hf_attribution.retraining.recipe import Recipe
from hf_attribution.retraining.runners import run_plan
from hf_attribution.retraining.runs import train_and_measure

__all__ = ["FollowUp", "Plan", "Recipe", "Request", "make_plan", "run_plan", "train_and_measure"]
