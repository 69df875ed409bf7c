"""What kernels were measured to take, kept: `Measurements` is the store, `bucket` says which calls share a measurement."""

from kpt.tuning.bucket import Bucket, bucket
from kpt.tuning.exchange import Import, export_json, import_json
from kpt.tuning.measurements import Key, Measurement, Measurements

__all__ = ["Bucket", "Import", "Key", "Measurement", "Measurements", "bucket", "export_json", "import_json"]
