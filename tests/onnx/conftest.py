"""onnxruntime's fused operators came after 1.23.2, the last for Python 3.10."""

import sys

collect_ignore = [] if sys.version_info >= (3, 11) else ["test_fused.py"]
