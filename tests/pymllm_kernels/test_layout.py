"""Bit packing and weight layouts: exact round trips, on CPU."""

from __future__ import annotations

import pytest
import torch

from pymllm_kernels.common.packing import pack_words, unpack_words, words_per_line
from pymllm_kernels.w4a16.layout import SlicedInt4, SlicedInt8, choose_layout

SHAPES = [(1, 1), (1, 127), (3, 128), (5, 129), (7, 2112), (300, 64), (257, 100), (0, 128)]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 128])
def test_words_round_trip(bits: int, count: int) -> None:
    codes = torch.randint(0, 1 << bits, (5, count), dtype=torch.uint8)
    words = pack_words(codes, bits)
    assert words.shape == (5, words_per_line(count, bits))
    assert torch.equal(unpack_words(words, bits, count), codes)


@pytest.mark.parametrize("bits", [4, 8])
def test_words_of_any_stride(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (3, 3), dtype=torch.uint8)
    words = pack_words(codes, bits)
    for view in (words.T.contiguous().T, words.repeat(2, 1)[::2], words.repeat(1, 2)[:, ::2]):
        dense = view.clone(memory_format=torch.contiguous_format)
        assert torch.equal(unpack_words(view, bits, 3), unpack_words(dense, bits, 3))


def test_words_follow_the_format() -> None:
    # Element i sits at bits 4 i of the word, the padding has raw code 0.
    codes = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 15, 9]], dtype=torch.uint8)
    expected = [0xF7654321 - (1 << 32), 9]
    assert pack_words(codes, 4).tolist() == [expected]
    assert pack_words(torch.tensor([[1, 255, 3]], dtype=torch.uint8), 8).tolist() == [[0x03FF01]]


@pytest.mark.parametrize(
    ("words", "bits", "count", "message"),
    [
        (torch.zeros(1, 2, dtype=torch.int32), 3, 8, "bits: found 3, accepted"),
        (torch.zeros(1, 2, dtype=torch.int64), 4, 16, "words: found dtype torch.int64"),
        (torch.zeros(1, 2, dtype=torch.int32), 4, 17, "found 2 words a line, expected 3"),
    ],
)
def test_words_refusals(words: torch.Tensor, bits: int, count: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_words(words, bits, count)


@pytest.mark.parametrize("block_k", [64, 128])
@pytest.mark.parametrize("layout_class", [SlicedInt4, SlicedInt8])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_layout_round_trip(
    layout_class: type[SlicedInt4 | SlicedInt8], block_k: int, n: int, k: int
) -> None:
    layout = layout_class(block_k)
    codes = torch.randint(0, 1 << layout.bits, (n, k), dtype=torch.uint8)
    packed = layout.pack(codes)
    assert packed.shape == layout.shape(n, k) and packed.dtype == layout.dtype
    assert torch.equal(layout.unpack(packed, n, k), codes)
    perm = torch.randperm(k)
    from_words = layout.pack_words(pack_words(codes, layout.bits), k, perm)
    assert torch.equal(layout.unpack(from_words, n, k), codes[:, perm])


def test_sliced_int4_places_every_input() -> None:
    layout = SlicedInt4(128)
    codes = torch.randint(0, 16, (2, 256), dtype=torch.uint8)
    packed = layout.pack(codes)
    for k in (0, 31, 32, 95, 127, 128, 200, 255):
        block, within = divmod(k, 128)
        j, c = divmod(within, 32)
        assert (int(packed[block, 1, c]) >> (4 * j)) & 15 == int(codes[1, k])


def test_sliced_int8_places_every_input() -> None:
    layout = SlicedInt8(128)
    codes = torch.randint(0, 256, (2, 256), dtype=torch.uint8)
    packed = layout.pack(codes)
    for k in (0, 31, 32, 95, 127, 128, 200, 255):
        block, within = divmod(k, 128)
        j, c = divmod(within, 32)
        word = int(packed[block, 1, j // 2 * 32 + c])
        assert (word >> (8 * (j % 2))) & 255 == int(codes[1, k])


@pytest.mark.parametrize(
    ("bits", "k", "group_size", "block_k"),
    [
        (4, 4096, 128, 128),
        (4, 4096, -1, 128),
        (4, 2112, 64, 64),  # 2112 = 33 * 64: blocks of 128 would add 3 %
        (4, 96, 16, 64),  # a slice of 16 lies in one group
        (4, 96, 48, 64),
        (8, 4096, 32, 128),
        (4, 100, 20, 128),
    ],
)
def test_choice_of_layout(bits: int, k: int, group_size: int, block_k: int) -> None:
    layout = choose_layout(bits, k, group_size)
    assert (layout.bits, layout.block_k) == (bits, block_k)
