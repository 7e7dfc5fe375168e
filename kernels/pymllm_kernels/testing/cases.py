"""Every compiled form of the kernels, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter

import torch

from pymllm_kernels.common.sharing import STREAM_K
from pymllm_kernels.device import DeviceFacts, planned_device
from pymllm_kernels.per_token_quant_int8 import kernel as quant_kernel
from pymllm_kernels.testing.aot import AotCase
from pymllm_kernels.w4a16 import kernel as w4a16_kernel
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig as HopperW4A16Config
from pymllm_kernels.w4a16.tuning import Config, Form, choose_config
from pymllm_kernels.w8a8_int8 import kernel as w8a8_kernel
from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig, plan_launch
from pymllm_kernels.w8a8_int8.hopper_tuning import candidates as hopper_candidates
from pymllm_kernels.w8a8_int8.hopper_tuning import choose_config as choose_hopper_config
from pymllm_kernels.w8a8_int8.tuning import choose_config as choose_w8a8_config

_POINTER = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
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
)

_HOPPER_VARIANTS = ("bf16-g128", "fp16-g128", "bf16-g64-asym", "fp16-g32-asym")


def target_device(target: str) -> DeviceFacts:
    """Facts of a compile target such as ``sm_90`` or ``gfx942``."""
    if target.startswith("gfx"):
        return DeviceFacts("hip", target, None, 64 * 1024, 0)
    number = target.removeprefix("sm_")
    return planned_device(f"{number[:-1]}.{number[-1]}")


def w4a16_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> Iterator[AotCase]:
    """The weight-only GEMM: every variant at the tile of each number of tokens."""
    device = target_device(target)
    for variant in W4A16_VARIANTS:
        form = Form(variant.bits, variant.block_k, variant.group_size, variant.group_index)
        configs = dict.fromkeys(choose_config(m, form, device) for m in tokens)
        for config in configs:
            yield _w4a16_case(variant, form, config, device)


def _w4a16_case(variant: W4A16Variant, form: Form, config: Config, device: DeviceFacts) -> AotCase:
    constants = w4a16_kernel.kernel_constants(form, config, variant.k, variant.dtype, device)
    pointer = _POINTER[variant.dtype]
    optional = {
        "perm_ptr": "*i32" if variant.act_order else None,
        "zero_ptr": "*i8" if variant.zero else None,
        "group_ptr": "*i32" if variant.group_index else None,
        "bias_ptr": pointer,
    }
    signature = {
        "x_ptr": pointer,
        "weight_ptr": "*i16" if variant.bits == 4 else "*i8",
        "scale_ptr": pointer,
        "out_ptr": pointer,
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(("M", "N", "K", "groups", "stride_xm", "stride_wb", "stride_om"), "i32"),
    }
    constants["stride_xk"] = 1
    constants.update({name: None for name, kind in optional.items() if kind is None})
    aligned = [name for name in signature if name.endswith("_ptr") or name == "stride_wb"]
    if variant.k % 16 == 0:
        aligned += ["N", "K", "stride_xm", "stride_om"]
    return AotCase(
        f"w4a16-{variant.name}-{config.block_m}x{config.block_n}",
        w4a16_kernel._w4a16_gemm_kernel,
        signature,
        constants,
        config.num_warps,
        config.num_stages,
        tuple(aligned),
    )


def w4a16_hopper_case(
    variant: W4A16Variant, config: HopperW4A16Config, bias: bool = True
) -> AotCase:
    """One form of the weight-only GEMM for Hopper."""
    # Gluon kernels are imported where they are compiled: other targets do without them.
    from pymllm_kernels.common.gluon_hopper import tile_layout
    from pymllm_kernels.w4a16 import hopper, hopper_launch

    def box(dtype: torch.dtype, *shape: int) -> str:
        kind = {torch.int16: "i16", torch.int8: "i8"}.get(dtype) or _POINTER[dtype][1:]
        one_row = len(shape) == 1
        layout = hopper_launch.row_layout(dtype) if one_row else tile_layout(*shape, dtype)
        return f"tensordesc<{kind}{list(shape)},{layout!r}>"

    form = hopper_launch.form_of(
        variant.block_k, variant.group_size, variant.dtype, variant.dtype, not variant.zero
    )
    slice_k = variant.block_k // 4
    pointer = _POINTER[variant.dtype]
    shared = config.share != 1
    optional = {
        "zero_desc": box(torch.int8, config.block_n) if variant.zero else None,
        "out_desc": (
            box(variant.dtype, config.block_m // config.out_parts, config.rows)
            if config.out_parts
            else None
        ),
        "bias_ptr": pointer if bias else None,
        "part_ptr": "*fp32" if shared else None,
        "count_ptr": "*i32" if shared else None,
    }
    sizes = ("M", "N", "groups", "tiles_m", "tiles_n", "whole", "steps", "stride_om")
    signature = {
        "x_desc": box(variant.dtype, config.block_m, 2 * slice_k),
        "weight_desc": box(torch.int16, config.block_n, slice_k),
        "scale_desc": box(variant.dtype, config.block_n),
        "out_ptr": pointer,
        **{name: kind for name, kind in optional.items() if kind is not None},
        **dict.fromkeys(sizes, "i32"),
    }
    return AotCase(
        f"w4a16-hopper-{variant.name}-{config.block_m}x{config.block_n}-share{config.share}",
        hopper.w4a16_gemm_hopper,
        signature,
        {
            **hopper_launch.kernel_constants(config, form, variant.group_size, variant.dtype),
            **{name: None for name, kind in optional.items() if kind is None},
        },
        num_warps=4,
        num_stages=3,
        divisible_by_16=(*(n for n in signature if n.endswith("_ptr")), "stride_om"),
        options={"maxnreg": hopper_launch.LAUNCH_REGISTERS[config.consumers]},
    )


def w4a16_hopper_cases() -> Iterator[AotCase]:
    """The weight-only GEMM for Hopper: every measured tile, shared and not, and other groups."""
    from pymllm_kernels.w4a16.hopper_tuning import HopperForm, candidates

    plain, *others = (v for v in W4A16_VARIANTS if v.name in _HOPPER_VARIANTS)
    every = [c for _, c in candidates(1, 128, 4096, HopperForm(), 132, 227 * 1024)]
    for config in every:
        if config.share in (1, STREAM_K):
            yield w4a16_hopper_case(plain, config, bias=config.share == 1)
    for variant in others:
        form = HopperForm(variant.block_k, max(1, variant.block_k // variant.group_size), 3)
        tiles = {c.block_m: c for _, c in candidates(1, 128, 4096, form, 132, 227 * 1024)}
        for block_m in (16, 128):
            yield w4a16_hopper_case(variant, tiles[block_m])


def w8a8_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> Iterator[AotCase]:
    """The int8 GEMM with and without zero points, K even and ragged."""
    device = target_device(target)
    for name, k, optional in (
        ("plain", 4096, {}),
        ("zero-bias", 4096, {"x_zero_ptr": "*i32", "column_sum_ptr": "*i32", "bias_ptr": "*bf16"}),
        ("ragged-K", 4090, {}),
    ):
        for config in dict.fromkeys(choose_w8a8_config(m, k, device) for m in tokens):
            signature = {
                "x_ptr": "*i8",
                "weight_ptr": "*i8",
                "x_scale_ptr": "*fp32",
                "w_scale_ptr": "*fp32",
                "out_ptr": "*bf16",
                **optional,
                **dict.fromkeys(("M", "N", "K", "stride_xm", "stride_wn", "stride_om"), "i32"),
            }
            absent = {"x_zero_ptr", "column_sum_ptr", "bias_ptr"} - set(optional)
            constants = {
                **w8a8_kernel.kernel_constants(k, config),
                **dict.fromkeys(absent),
                "stride_xs": 1,
                "stride_ws": 1,
            }
            aligned = [n for n in signature if n.endswith("_ptr")]
            if k % 16 == 0:
                aligned += ["N", "K", "stride_xm", "stride_wn", "stride_om"]
            yield AotCase(
                f"w8a8_int8-{name}-{config.block_m}x{config.block_n}",
                w8a8_kernel._w8a8_int8_gemm_kernel,
                signature,
                constants,
                config.num_warps,
                config.num_stages,
                tuple(aligned),
            )


def w8a8_hopper_case(
    config: HopperConfig,
    *,
    dtype: torch.dtype = torch.bfloat16,
    zero: bool = False,
    bias: bool = False,
    pdl: bool = True,
) -> AotCase:
    """One form of the int8 GEMM for Hopper."""
    # Gluon kernels are imported where they are compiled: other targets do without them.
    from pymllm_kernels.common.gluon_hopper import tile_layout
    from pymllm_kernels.w8a8_int8 import hopper, hopper_launch

    def descriptor(kind: str, rows: int, columns: int, element: torch.dtype) -> str:
        layout = tile_layout(rows, columns, element)
        return f"tensordesc<{kind}{[rows, columns]},{layout!r}>"

    pointer = _POINTER[dtype]
    shared = config.share != 1
    optional = {
        "x_zero_ptr": "*i32" if zero else None,
        "column_sum_ptr": "*i32" if zero else None,
        "bias_ptr": pointer if bias else None,
        "part_ptr": "*i32" if shared else None,
        "count_ptr": "*i32" if shared else None,
    }
    signature = {
        "x_desc": descriptor("i8", config.tokens, config.block_k, torch.int8),
        "weight_desc": descriptor("i8", config.block_n, config.block_k, torch.int8),
        "out_desc": descriptor(pointer[1:], *config.out_block, dtype),
        "out_ptr": pointer,
        "x_scale_ptr": "*fp32",
        "w_scale_ptr": "*fp32",
        "stride_om": "i32",
        "whole": "i32",
        **{name: kind for name, kind in optional.items() if kind is not None},
    }
    absent = {name: None for name, kind in optional.items() if kind is None}
    way = "whole" if not shared else "meet" if config.meet else "shared"
    odd = "-zero" * zero + "-bias" * bias
    return AotCase(
        f"w8a8_int8-hopper-{config.tokens}x{config.block_n}-{way}{odd}",
        hopper.w8a8_int8_hopper_kernel,
        signature,
        {
            **hopper_launch.kernel_constants(config, pdl),
            **absent,
            "stride_xs": 1,
            "stride_ws": 1,
        },
        num_warps=4,
        num_stages=3,
        divisible_by_16=(*(name for name in signature if name.endswith("_ptr")), "stride_om"),
        options={"maxnreg": config.registers[0]},
    )


# (N, K) whose tiles go to programs whole, evenly, or in runs.
_HOPPER_SHAPES = ((4096, 4096), (8192, 28672), (28672, 4096), (4096, 14336))


def w8a8_hopper_cases(tokens: tuple[int, ...] = _TOKENS) -> Iterator[AotCase]:
    """The int8 GEMM for Hopper, plain and with zero points and bias, at the rule's tiles.

    And the cheapest form whose tiles are shared for each number of tokens: the rule may take none.
    """
    device = target_device("sm_90")
    forms: dict[tuple[HopperConfig, bool], None] = {}
    for m in tokens:
        for n, k in _HOPPER_SHAPES:
            config = choose_hopper_config(m, n, k, 132, device.shared_memory)
            plan = plan_launch(config, m, n, k, 132)
            assert plan is not None
            # How many programs share a tile is not compiled in, only whether any do.
            form = replace(config, share=1 if config.share == 1 else STREAM_K)
            forms[form, plan.dependent] = None
        found = hopper_candidates(m, 4096, 8192, 132, device.shared_memory)
        for _, config in sorted((item for item in found if item[1].share != 1), key=itemgetter(0))[
            :1
        ]:
            forms[replace(config, share=STREAM_K), not config.meet] = None
    for config, pdl in forms:
        yield w8a8_hopper_case(config, pdl=pdl)
        yield w8a8_hopper_case(config, zero=True, bias=True, pdl=pdl)


def quant_cases() -> Iterator[AotCase]:
    """Activation quantization: dynamic (one block and several, both kinds) and static."""
    for k in (4096, 28672):
        block, warps = quant_kernel.launch_parameters(k)
        for zero in (None, "*i32"):
            for static in (False, True):
                signature = {
                    "x_ptr": "*bf16",
                    "codes_ptr": "*i8",
                    "scale_ptr": "*fp32",
                    **({} if zero is None else {"zero_ptr": zero}),
                    **dict.fromkeys(("K", "stride_xm", "stride_cm", "counters"), "i32"),
                }
                constants: dict[str, object] = {"BLOCK_K": block, "stride_xk": 1, "PDL": False}
                constants["counters_ptr"] = None
                if zero is None:
                    constants["zero_ptr"] = None
                if not static:
                    constants["ONE_BLOCK"] = k <= block
                yield AotCase(
                    f"quant-{'static' if static else 'dynamic'}-{zero or 'symmetric'}-{k}",
                    quant_kernel._static_quant_kernel
                    if static
                    else quant_kernel._per_token_quant_kernel,
                    signature,
                    constants,
                    warps,
                    3,
                    tuple(name for name in signature if name != "counters"),
                    {"enable_fp_fusion": False},
                )


def all_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> list[AotCase]:
    """Every kernel of the library at the tiles that ``tokens`` take on ``target``."""
    cases = [*w4a16_cases(target, tokens), *w8a8_cases(target, tokens), *quant_cases()]
    if target == "sm_90":
        cases += [*w4a16_hopper_cases(), *w8a8_hopper_cases(tokens)]
    return cases
