"""How programs are timed against each other, and what kernels were measured to take, kept: `Measurements` is the store, `bucket` says
which calls share a measurement."""

from kpt.tuning.bucket import Bucket, bucket
from kpt.tuning.exchange import Import, export_json, import_json
from kpt.tuning.measurements import Key, Measurement, Measurements
from kpt.tuning.rounds import SECONDS, certain, gain, ratio, rounds, sigmas

__all__ = [
    "SECONDS", "Bucket", "Import", "Key", "Measurement", "Measurements", "bucket", "certain", "export_json", "gain", "import_json", "ratio",
    "rounds", "sigmas",
]  # fmt: skip
