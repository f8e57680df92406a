"""General compressors, with a window as long as a model's context: bits per byte without any training.

A compressor is given the scored bytes as one file and the smallest window of its format that is at least as
long as the context. It has read nothing before: no training text, no dictionary. The size is that of the
whole file with its header, as the command prints it, so that anyone can check it:

    gzip -9                                  window 512 bytes to 32 KiB (the command always uses 32 KiB)
    xz -9e --lzma2=preset=9e,dict=…          window 4 KiB to 1 GiB
    zstd -19 --zstd=wlog=…                   window 1 KiB to 128 MiB
"""

from __future__ import annotations

import importlib
import importlib.util
import lzma
import zlib

GZIP_LOG, XZ_LOG, ZSTD_LOG = (9, 15), (12, 30), (10, 27)
"""log₂ of the shortest and the longest window that is used of each format."""
ZSTD_LEVEL = 19
ZSTD_MODULE = "zstandard"


def window_log(context: int, limits: tuple[int, int]) -> int:
    """Return log₂ of the smallest window of at least `context` bytes, within the limits of a format."""
    low, high = limits
    return min(max((context - 1).bit_length(), low), high)


def gzip_bytes(text: bytes, context: int) -> int:
    """Return the size of the text as a gzip file."""
    # 16 more than the window makes a gzip file; the memory level is that of the command
    stream = zlib.compressobj(9, zlib.DEFLATED, 16 + window_log(context, GZIP_LOG), 9)
    return len(stream.compress(text)) + len(stream.flush())


def xz_bytes(text: bytes, context: int) -> int:
    """Return the size of the text as an xz file."""
    window = 2 ** window_log(context, XZ_LOG)
    chain = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": window}]
    return len(lzma.compress(text, format=lzma.FORMAT_XZ, filters=chain))


def has_zstd() -> bool:
    """Return whether the package of `zstd_bytes` is installed."""
    return importlib.util.find_spec(ZSTD_MODULE) is not None


def zstd_bytes(text: bytes, context: int) -> int | None:
    """Return the size of the text as a zstd file; None if the optional package zstandard is missing."""
    if not has_zstd():
        return None
    zstd = importlib.import_module(ZSTD_MODULE)
    parameters = zstd.ZstdCompressionParameters.from_level(
        ZSTD_LEVEL, window_log=window_log(context, ZSTD_LOG), source_size=len(text)
    )
    return len(zstd.ZstdCompressor(compression_params=parameters).compress(text))
