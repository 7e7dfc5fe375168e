"""Every compiled form of the kernels, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from pymllm_kernels.common.sharing import HAND_ON, STREAM_K, compiled_config
from pymllm_kernels.common.specialization import Specialization
from pymllm_kernels.device import DeviceFacts, planned_device
from pymllm_kernels.per_token_quant_int8 import launch as quant_launch
from pymllm_kernels.w4a16 import launch as w4a16_launch
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig as HopperW4A16Config
from pymllm_kernels.w4a16.tuning import Config, Form, choose_config
from pymllm_kernels.w8a8_int8 import launch as w8a8_launch
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, plan_launch
from pymllm_kernels.w8a8_int8.hopper_tuning import candidates as hopper_candidates
from pymllm_kernels.w8a8_int8.tuning import choose_config as choose_w8a8_config

_TOKENS = (1, 17, 64, 4096)


@dataclass(frozen=True)
class W4A16Variant:
    """One kind of weight-only layer."""

    name: str
    dtype: torch.dtype = torch.bfloat16
    bits: int = 4
    block_k: int = 128
    group_size: int = 128
    zero: bool = False
    act_order: bool = False
    group_index: bool = False
    k: int = 4096


W4A16_VARIANTS = (
    W4A16Variant("bf16-g128"),
    W4A16Variant("fp16-g128", dtype=torch.float16),
    W4A16Variant("bf16-g128-asym", zero=True),
    W4A16Variant("bf16-g64-asym", group_size=64, zero=True),
    W4A16Variant("bf16-g32", group_size=32),
    W4A16Variant("fp16-g32-asym", dtype=torch.float16, group_size=32, zero=True),
    W4A16Variant("bf16-g16", group_size=16, block_k=64),
    W4A16Variant("bf16-channel", group_size=-1),
    W4A16Variant("bf16-channel-asym-ragged-K", group_size=-1, zero=True, k=4090),
    W4A16Variant("bf16-g20-asym", group_size=20, zero=True, group_index=True, k=4100),
    W4A16Variant("bf16-g128-act-order", act_order=True),
    W4A16Variant("bf16-int8-g128", bits=8),
    W4A16Variant("bf16-int8-channel-asym", bits=8, group_size=-1, zero=True),
    W4A16Variant("fp16-int8-g32-asym", dtype=torch.float16, bits=8, group_size=32, zero=True),
)

_HOPPER_VARIANTS = ("bf16-g128", "fp16-g128", "bf16-g64-asym", "bf16-g32", "fp16-g32-asym")
_HOPPER_INT8_VARIANTS = (
    *(v for v in W4A16_VARIANTS if v.name in ("bf16-int8-g128", "fp16-int8-g32-asym")),
    W4A16Variant("bf16-int8-g64-asym", bits=8, group_size=64, zero=True),
    W4A16Variant("bf16-int8-g16", bits=8, group_size=16, block_k=64),
)
_DECODE_VARIANTS = (*_HOPPER_VARIANTS, "bf16-g128-asym")
# The registers of groups of 128, but for an address or a wait at the start.
_DECODE_VARIANTS_OF_SAME_REGISTERS = ("bf16-channel", "bf16-g128-act-order")
# One token that is kept; in act-order it takes most registers.
_DECODE_VARIANTS_KEPT = ("bf16-g128", "fp16-g32-asym")
# (tokens, consumers) of tiles that are handed on: with more of both come more registers.
_HANDED_ON = ((16, 4), (64, 3), (128, 2), (128, 3), (256, 2))


def target_device(target: str) -> DeviceFacts:
    """Facts of a compile target such as ``sm_90`` or ``gfx942``."""
    if target.startswith("gfx"):
        return DeviceFacts("hip", target, None, 64 * 1024, 0)
    number = target.removeprefix("sm_")
    return planned_device(f"{number[:-1]}.{number[-1]}")


def w4a16_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> Iterator[Specialization]:
    """The weight-only GEMM: every variant at the tile of each number of tokens."""
    device = target_device(target)
    for variant in W4A16_VARIANTS:
        form = Form(variant.bits, variant.block_k, variant.group_size, variant.group_index)
        configs = dict.fromkeys(choose_config(m, form, device) for m in tokens)
        for config in configs:
            yield _w4a16_case(variant, form, config, device)


def _w4a16_case(
    variant: W4A16Variant, form: Form, config: Config, device: DeviceFacts
) -> Specialization:
    key = w4a16_launch.TritonForm(
        form, config, variant.dtype, variant.dtype, variant.zero, variant.act_order, variant.dtype,
        device.type, even=variant.k % form.block_k == 0, aligned=variant.k % 16 == 0,
    )  # fmt: skip
    tile = f"{config.block_m}x{config.block_n}"
    return replace(w4a16_launch.specialization(key), name=f"w4a16-{variant.name}-{tile}")


def w4a16_hopper_case(
    variant: W4A16Variant, config: HopperW4A16Config, bias: bool = True
) -> Specialization:
    """One form of the weight-only GEMM for Hopper."""
    # Gluon kernels are imported where they are compiled: other targets do without them.
    from pymllm_kernels.w4a16.hopper_launch import HopperLayer, specialization

    layer = HopperLayer(
        4096, variant.k, variant.block_k, variant.group_size, variant.dtype, variant.dtype,
        variant.zero, variant.dtype if bias else None, variant.act_order, variant.bits,
    )  # fmt: skip
    form = specialization(layer, config)
    return replace(form, name=f"{form.name}-{variant.name}")


def w4a16_hopper_cases() -> Iterator[Specialization]:
    """The weight-only GEMM for Hopper: every measured tile, shared and not, and other groups."""
    plain, *others = (v for v in W4A16_VARIANTS if v.name in _HOPPER_VARIANTS)
    plain_int8, *others_int8 = _HOPPER_INT8_VARIANTS
    for config in _hopper_tiles(plain):
        if config.share in (1, STREAM_K):
            yield w4a16_hopper_case(plain, config, bias=config.share == 1)
    for config in _hopper_tiles(plain_int8):
        if config.share == STREAM_K:
            yield w4a16_hopper_case(plain_int8, config, bias=False)
    for variant, handed in ((plain, _HANDED_ON), (plain_int8, _HANDED_ON[2:3])):
        found = _hopper_tiles(variant, 133 * 256)
        tiles = {(c.block_m, c.consumers): c for c in found if c.share == HAND_ON}
        for tile in handed:
            yield w4a16_hopper_case(variant, tiles[tile], bias=False)
    for variant in (*others, *others_int8):
        found = _hopper_tiles(variant)
        tiles = {(c.block_m, c.consumers): c for c in found}
        for tile in ((16, 4), (16, 3), (64, 4), (128, 2), (128, 3)):
            yield w4a16_hopper_case(variant, tiles[tile])
        # Stored by TMA where they are whole.
        whole = {(c.block_m, c.consumers): c for c in found if c.share == 1}
        for tile in ((64, 3), (128, 3)):
            yield w4a16_hopper_case(variant, whole[tile])


def _hopper_tiles(variant: W4A16Variant, n: int = 128) -> list[HopperW4A16Config]:
    """Every measured tile as a layer of ``n`` features takes it, in every way to share it."""
    from pymllm_kernels.w4a16.hopper_launch import form_of
    from pymllm_kernels.w4a16.hopper_tuning import candidates

    form = form_of(
        variant.block_k, variant.group_size, variant.dtype, variant.dtype, not variant.zero,
        variant.bits,
    )  # fmt: skip
    return [config for _, config in candidates(1, n, variant.k, form, 132, 227 * 1024)]


def w4a16_decode_cases() -> Iterator[Specialization]:
    """The weight-only GEMM for few tokens on Hopper: every configuration, all kinds of layers."""
    from pymllm_kernels.gather_inputs import launch as gather
    from pymllm_kernels.w4a16.hopper_decode_launch import specialization
    from pymllm_kernels.w4a16.hopper_decode_tuning import CONFIGS, why_invalid
    from pymllm_kernels.w4a16.hopper_launch import HopperLayer

    for variant in W4A16_VARIANTS:
        if variant.name not in (*_DECODE_VARIANTS, *_DECODE_VARIANTS_OF_SAME_REGISTERS):
            continue
        layer = HopperLayer(
            4096, variant.k, variant.block_k, variant.group_size, variant.dtype, variant.dtype,
            variant.zero, variant.dtype if variant.zero else None, variant.act_order,
        )  # fmt: skip
        valid = [c for c in CONFIGS if why_invalid(c, 1, 2048, layer.form, 227 * 1024) is None]
        read = [c for c in valid if not c.keep]
        few = variant.name in _DECODE_VARIANTS_OF_SAME_REGISTERS
        forms = [specialization(layer, c, 0) for c in (read[:: len(read) - 1] if few else read)]
        if variant.name in _DECODE_VARIANTS_KEPT:
            ordered = layer._replace(act_order=True)
            # The longest token: most registers.
            rows = {c: 8192 // c.together for c in valid if c.keep}
            forms += [specialization(ordered, c, row) for c, row in rows.items()]
        for form in forms:
            yield replace(form, name=f"{form.name}-{variant.name}")
    for k, even in ((4096, True), (14336, True), (28672, True), (53248, True), (4096, False)):
        yield gather.specialization(gather.form_of(torch.bfloat16, k, even))


def w8a8_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> Iterator[Specialization]:
    """The int8 GEMM with and without zero points, K even and ragged."""
    device = target_device(target)
    for name, k, odd in (
        ("plain", 4096, False),
        ("zero-bias", 4096, True),
        ("ragged-K", 4090, False),
    ):
        for config in dict.fromkeys(choose_w8a8_config(m, k, device) for m in tokens):
            key = w8a8_launch.TritonForm(
                config, torch.bfloat16, zero=odd, bias=torch.bfloat16 if odd else None,
                even=k % config.block_k == 0, aligned=k % 16 == 0,
            )  # fmt: skip
            tile = f"{config.block_m}x{config.block_n}"
            yield replace(w8a8_launch.specialization(key), name=f"w8a8_int8-{name}-{tile}")


def w8a8_hopper_case(
    config: HopperConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    zero: bool = False,
    bias: bool = False,
    pdl: bool = True,
) -> Specialization:
    """One form of the int8 GEMM for Hopper."""
    # Gluon kernels are imported where they are compiled: other targets do without them.
    from pymllm_kernels.w8a8_int8.hopper_launch import specialization
    from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer

    layer = HopperLayer(4096, 4096, dtype, zero=zero, bias=dtype if bias else None)
    return specialization(layer, config, pdl)


# (N, K) whose tiles go to programs whole, evenly, or in runs.
_HOPPER_SHAPES = ((4096, 4096), (8192, 28672), (28672, 4096), (4096, 14336))


def w8a8_hopper_cases(tokens: tuple[int, ...] = _TOKENS) -> Iterator[Specialization]:
    """The int8 GEMM for Hopper, plain and with zero points and bias, at the rule's tiles.

    And the cheapest form whose tiles are shared for each number of tokens: the rule may take none.
    """
    device = target_device("sm_90")
    forms: dict[tuple[HopperConfig, bool], None] = {}
    for m in tokens:
        for n, k in _HOPPER_SHAPES:
            found = hopper_candidates(m, n, k, 132, device.shared_memory)
            config = min(found, key=itemgetter(0))[1]
            plan = plan_launch(config, m, n, k, 132)
            assert plan is not None
            # How many programs share a tile is not compiled in, only whether any do.
            form = compiled_config(config)
            forms[form, plan.dependent] = None
        found = hopper_candidates(m, 4096, 8192, 132, device.shared_memory)
        for _, config in sorted((item for item in found if item[1].share != 1), key=itemgetter(0))[
            :1
        ]:
            forms[replace(config, share=STREAM_K), not config.meet] = None
    for config, pdl in forms:
        yield w8a8_hopper_case(config, pdl=pdl)
        yield w8a8_hopper_case(config, zero=True, bias=True, pdl=pdl)


def w8a8_decode_cases() -> Iterator[Specialization]:
    """The int8 layer for few tokens on Hopper: every configuration and kind of activation."""
    from pymllm_kernels.w8a8_int8.hopper_decode_launch import specialization
    from pymllm_kernels.w8a8_int8.hopper_decode_tuning import CONFIGS
    from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer

    for config in CONFIGS:
        for dtype, zero, static, bias in (
            (torch.bfloat16, False, False, None),
            (torch.float16, True, False, torch.float16),
            (torch.bfloat16, True, True, torch.bfloat16),
        ):
            layer = HopperLayer(4096, 4096, dtype, static=static, zero=zero, bias=bias)
            yield specialization(layer, config)


def w8a8_fused_cases() -> Iterator[Specialization]:
    """The int8 layer for Hopper that quantizes tokens itself: every configuration.

    With 1 and 8 tokens plain activations, as many values as a token may have; with 2 and 4 other kinds.
    """
    from pymllm_kernels.w8a8_int8.hopper_fused_launch import forms
    from pymllm_kernels.w8a8_int8.hopper_fused_tuning import CONFIGS, why_invalid
    from pymllm_kernels.w8a8_int8.hopper_layer import HopperLayer

    shared_memory = target_device("sm_90").shared_memory
    for config in CONFIGS:
        k = next(k for k in (14336, 8192, 4096) if why_invalid(config, 1, k, shared_memory) is None)
        layer = HopperLayer(4096, k, torch.bfloat16)
        if config.block_m in (2, 4):
            layer = HopperLayer(
                4096, k, torch.float16, static=config.block_m == 2, zero=True, bias=torch.float16
            )
        for form in forms(layer, config, shared_memory):
            yield form.specialization()


def quant_cases() -> Iterator[Specialization]:
    """Activation quantization: dynamic (one block and several, both kinds) and static."""
    for k in (4096, 28672):
        for zero in (False, True):
            for static in (False, True):
                form = quant_launch.form_of(torch.bfloat16, k, k, 1, 0, static=static, zero=zero)
                yield quant_launch.specialization(form)


def all_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> list[Specialization]:
    """Every kernel of the library at the tiles that ``tokens`` take on ``target``."""
    cases = [*w4a16_cases(target, tokens), *w8a8_cases(target, tokens), *quant_cases()]
    if target == "sm_90":
        cases += [*w4a16_hopper_cases(), *w4a16_decode_cases(), *w8a8_hopper_cases(tokens)]
        cases += [*w8a8_decode_cases(), *w8a8_fused_cases()]
    return cases
