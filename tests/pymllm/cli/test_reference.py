"""The fp64 reference against a reading of the format written out weight by weight."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from pymllm.cli.reference import exact_output, unpack
from pymllm.quantization.format import LayerScheme, parse_group

N, K, GROUP = 13, 40, 20


def wna16(bits: int = 4, **weights: object) -> LayerScheme:
    arguments = {"num_bits": bits, "strategy": "group", "group_size": GROUP, **weights}
    return parse_group("g", {"targets": ["Linear"], "weights": arguments}, "pack-quantized")


def w8a8(strategy: str) -> LayerScheme:
    inputs = {"num_bits": 8, "strategy": "token", "dynamic": True}
    weights = {"num_bits": 8, "strategy": strategy}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return parse_group("g", group, "int-quantized")


def random(low: int, high: int, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(high + len(shape))
    return torch.randint(low, high, shape, generator=generator).to(torch.int8)


def expected_rows(
    codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, groups: list[int]
) -> torch.Tensor:
    """``(code - zero) * scale`` one by one in Python's own arithmetic."""
    rows = [
        [
            (int(codes[n, k]) - int(zero[n, groups[k]])) * float(scale[n, groups[k]])
            for k in range(K)
        ]
        for n in range(N)
    ]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero_form", ["none", "packed", "int8"])
@pytest.mark.parametrize("order", ["neighbours", "act-order", "unset"])
def test_weight_only(bits: int, zero_form: str, order: str) -> None:
    half = 1 << (bits - 1)
    codes, scale = random(-half, half, N, K), torch.rand(N, K // GROUP).to(torch.bfloat16)
    zero = random(-half, half, N, K // GROUP) if zero_form != "none" else torch.zeros(N, 2)
    groups = [k // GROUP for k in range(K)]
    tensors = {"weight_packed": pack_to_int32(codes, bits), "weight_scale": scale}
    if zero_form == "packed":
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    elif zero_form == "int8":
        tensors["weight_zero_point"] = zero
    if order != "neighbours":
        groups = [k % 2 for k in range(K)] if order == "act-order" else groups
        stored = torch.tensor(groups, dtype=torch.int32)
        stored[7] = -1 if order == "unset" else stored[7]
        tensors["weight_g_idx"] = stored
    actorder = None if order == "neighbours" else "group"
    scheme = wna16(bits, symmetric=zero_form == "none", actorder=actorder)
    tensors["bias"] = torch.rand(N)
    # The identity as input gives the weight itself.
    found = exact_output(torch.eye(K), tensors, scheme)
    assert torch.equal(found, expected_rows(codes, scale, zero, groups).T + tensors["bias"])


def test_channel_scale_of_a_weight_only_layer() -> None:
    codes, scale = random(-8, 8, N, K), torch.rand(N, 1)
    tensors = {"weight_packed": pack_to_int32(codes, 4), "weight_scale": scale}
    scheme = wna16(strategy="channel", group_size=None)
    found = exact_output(torch.eye(K), tensors, scheme)
    assert torch.equal(found, (codes.double() * scale.double()).T)


@pytest.mark.parametrize("shape", [(N, 1), (N,), (1,), ()], ids=str)
def test_int8_scale_shapes(shape: tuple[int, ...]) -> None:
    codes, scale = random(-128, 128, N, K), torch.rand(shape)
    scheme = w8a8("channel" if N in shape else "tensor")
    found = exact_output(torch.eye(K), {"weight": codes, "weight_scale": scale}, scheme)
    assert torch.equal(found, (codes.double() * scale.double().reshape(-1, 1)).T)


def test_many_rows_are_cut_into_blocks_without_a_seam() -> None:
    rows = 2500
    codes, scale = random(-128, 128, rows, K), torch.rand(rows, 1)
    x = torch.randn(3, K, generator=torch.Generator().manual_seed(1))
    found = exact_output(x, {"weight": codes, "weight_scale": scale}, w8a8("channel"))
    expected = x.double() @ (codes.double() * scale.double()).T
    assert found.shape == (3, rows)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_top_bit_of_a_word_is_not_a_sign() -> None:
    # 0xF0000001 as int32: codes 1, six zeros, 15; signed -7, -8 (six times), 7.
    word = torch.tensor([[0xF0000001 - (1 << 32)]], dtype=torch.int32)
    assert unpack(word, 4, 8).tolist() == [[-7, -8, -8, -8, -8, -8, -8, 7]]
