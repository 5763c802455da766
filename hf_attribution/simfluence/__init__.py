"""Simfluence: a simulator of training, fitted to recorded loss curves of queries (Guu et al. 2023)."""

from hf_attribution.simfluence.curves import LossCurves, LossRun
from hf_attribution.simfluence.recording import record_losses
from hf_attribution.simfluence.simulator import Simfluence, fit_simfluence

__all__ = ["LossCurves", "LossRun", "Simfluence", "fit_simfluence", "record_losses"]
