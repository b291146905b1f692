"""Entropy coding of hidden-state codes: codes of like expected spread are grouped, each group with its own Huffman table.

Step and spread of a token and the levels of the axes (hidden_codec.py) tell how wide every code is expected to be: in
proportion to 2^((level + g - s) / 4). In order of width, zigzag-coded, low bytes before high bytes, they are compressed with
zstd, which adds a checksum. A zstd block is ended where the width changes, so that its Huffman table is of one width alone, and
zstd is told to look for few repetitions, as there are none but by chance. Class, step and spread stand before them.
"""

import numpy as np
import zstandard

from megatron_hylo.teachers.hidden_codec import SIDE

# the longest and fewest matches that it can be told to look for
_SETTINGS = zstandard.ZstdCompressionParameters.from_level(
    1, strategy=zstandard.STRATEGY_FAST, min_match=7, hash_log=6, window_log=20, write_checksum=True
)


def compress_block(codes: np.ndarray, levels: np.ndarray) -> bytes:
    """Compress codes int16 [tokens, 3 + H] into a block of bytes, given the levels of the axes int16 [K, H]."""
    side = codes[:, :SIDE]
    widths = _widths(side, levels)
    order = np.argsort(widths, kind="stable")
    values = np.concatenate([side.T.ravel(), codes[:, SIDE:].ravel()[order]]).astype(np.int32)
    zigzag = ((values << 1) ^ (values >> 31)).astype(np.uint16)
    changes = np.flatnonzero(np.diff(widths[order])) + 1
    edges = np.concatenate([len(codes) * np.arange(1, SIDE + 1), side.size + changes])
    compressor = zstandard.ZstdCompressor(compression_params=_SETTINGS).compressobj(size=2 * len(values))
    out = []
    for lot in np.split((zigzag & 255).astype(np.uint8), edges):
        out += [compressor.compress(lot.tobytes()), compressor.flush(zstandard.COMPRESSOBJ_FLUSH_BLOCK)]
    out += [compressor.compress((zigzag >> 8).astype(np.uint8).tobytes()), compressor.flush()]
    return b"".join(out)


def decompress_block(block: bytes, levels: np.ndarray) -> np.ndarray:
    """Invert `compress_block`: the codes int16 [tokens, 3 + H] of a block made with these levels.

    Raises:
        zstandard.ZstdError: damaged.
    """
    low, high = np.frombuffer(zstandard.ZstdDecompressor().decompress(block), np.uint8).reshape(2, -1).astype(np.uint16)
    zigzag = low | (high << 8)
    values = ((zigzag >> 1) ^ (0 - (zigzag & 1))).view(np.int16)
    tokens, width = len(values) // (SIDE + levels.shape[1]), levels.shape[1]
    side = values[: SIDE * tokens].reshape(SIDE, tokens).T
    codes = np.empty(width * tokens, np.int16)
    codes[np.argsort(_widths(side, levels), kind="stable")] = values[SIDE * tokens :]
    return np.concatenate([side, codes.reshape(tokens, width)], 1)


def _widths(side: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the expected widths of all codes, uint8 [tokens * H] (one pass of numpy's sort), from class, step and spread."""
    kind, step, spread = side.T
    widths = levels[kind] + (spread - step)[:, None]
    return np.minimum(widths - widths.min(), 255).astype(np.uint8).ravel()
