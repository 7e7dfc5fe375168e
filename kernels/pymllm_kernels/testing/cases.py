"""Every compiled form of the kernels, for compiling them ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pymllm_kernels.device import DeviceFacts, planned_device
from pymllm_kernels.per_token_quant_int8 import kernel as quant_kernel
from pymllm_kernels.testing.aot import AotCase
from pymllm_kernels.w4a16 import kernel as w4a16_kernel
from pymllm_kernels.w4a16.tuning import Config, Form, choose_config
from pymllm_kernels.w8a8_int8 import kernel as w8a8_kernel
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
                    **dict.fromkeys(("K", "stride_xm", "stride_cm"), "i32"),
                }
                constants: dict[str, object] = {"BLOCK_K": block, "stride_xk": 1}
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
                    tuple(signature),
                    {"enable_fp_fusion": False},
                )


def all_cases(target: str, tokens: tuple[int, ...] = _TOKENS) -> list[AotCase]:
    """Every kernel of the library at the tiles that ``tokens`` take on ``target``."""
    return [*w4a16_cases(target, tokens), *w8a8_cases(target, tokens), *quant_cases()]
