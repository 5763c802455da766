"""Studies of attributions that need retraining or more models: what an LDS does not say."""

from hf_attribution.studies.brittleness import Brittleness, brittleness
from hf_attribution.studies.removal import RemovalCurve, removal_curve
from hf_attribution.studies.stability import Stability, stability

__all__ = ["Brittleness", "RemovalCurve", "Stability", "brittleness", "removal_curve", "stability"]
