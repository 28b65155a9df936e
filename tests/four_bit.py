"""Formats of four bits, by a name for a test, with the options of `quantize`."""

FORMATS = {
    "nvfp4": {},
    "mxfp4": {},
    "int4": {"group_size": 32},
    "int4 with zero points": {"group_size": 64, "zero_point": True},
}
