"""The feature store: projected gradients on disk, in sealed shards that are also a `datasets` folder."""

from hf_attribution.store.manifest import Manifest
from hf_attribution.store.reader import FeatureStore
from hf_attribution.store.writer import FeatureWriter

__all__ = ["FeatureStore", "FeatureWriter", "Manifest"]
