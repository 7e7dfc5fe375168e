"""Which kernel runs where, and the reasons, on CPU over a table of devices."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pymllm_kernels import DeviceFacts, LinearProblem, kernel_names, planned_device, select_kernel
from pymllm_kernels.w4a16 import tuning as w4a16_tuning
from pymllm_kernels.w8a8_int8 import tuning as w8a8_tuning

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TRITON_CAPABILITIES = [
    "8.0",
    "8.6",
    "8.7",
    "8.9",
    "9.0",
    "10.0",
    "10.3",
    "11.0",
    "12.0",
    "12.1",
    "13.7",
]
OLD_CAPABILITIES = ["6.1", "7.0", "7.5"]
HIP = DeviceFacts("hip", "AMD Instinct MI300X", None, 64 * 1024, 304)


def w4a16(capability: str = "9.0", **changes: object) -> LinearProblem:
    problem = LinearProblem(
        "w4a16", 4096, 4096, 4, 128, True, False, BF16, BF16, planned_device(capability)
    )
    return dataclasses.replace(problem, **changes)  # type: ignore[arg-type]


def w8a8(capability: str = "9.0", **changes: object) -> LinearProblem:
    problem = LinearProblem(
        "w8a8_int8", 4096, 4096, 8, -1, True, False, BF16, FP32, planned_device(capability), "token"
    )
    return dataclasses.replace(problem, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("capability", TRITON_CAPABILITIES)
def test_triton_from_8_0(capability: str, dtype: torch.dtype) -> None:
    for problem, name in ((w4a16, "triton_w4a16"), (w8a8, "triton_w8a8_int8")):
        asked = problem(capability, act_dtype=dtype)
        choice = select_kernel(asked)
        if capability == "9.0":
            assert choice.kernel.name.startswith("gluon_hopper")
            choice = select_kernel(asked, name)
        assert choice.kernel.name == name
        assert (choice.note is not None) == (capability == "13.7")


def test_fp32_activations() -> None:
    choice = select_kernel(w4a16(act_dtype=FP32))
    assert choice.kernel.name == "torch_w4a16"
    assert dict(choice.refusals)["triton_w4a16"].endswith("found torch.float32")
    assert select_kernel(w8a8(act_dtype=FP32)).kernel.name == "triton_w8a8_int8"


def test_unknown_capability_is_told() -> None:
    note = select_kernel(w4a16("13.7")).note
    assert note is not None and "13.7 is not yet known" in note


def test_amd_is_told_to_be_untested() -> None:
    for problem in (w4a16(device=HIP), w8a8(device=HIP)):
        choice = select_kernel(problem)
        assert choice.kernel.name.startswith("triton")
        assert choice.note is not None and "untested" in choice.note


@pytest.mark.parametrize("capability", OLD_CAPABILITIES)
def test_torch_below_8_0(capability: str) -> None:
    choice = select_kernel(w4a16(capability))
    assert choice.kernel.name == "torch_w4a16"
    reasons = dict(choice.refusals)
    assert reasons["triton_w4a16"].startswith("needs capability 8.0")
    assert reasons["triton_w4a16"].endswith(f"found {capability}")
    expected = "torch_int_mm" if capability == "7.5" else "torch_w8a8_int8"
    assert select_kernel(w8a8(capability)).kernel.name == expected
    assert select_kernel(w8a8(capability, n=4095)).kernel.name == "torch_w8a8_int8"


@pytest.mark.parametrize(
    ("changes", "kernel", "reason"),
    [
        ({}, "cpu_int4pack", None),
        ({"weight_bits": 8}, "torch_w4a16", "weights of 4 bits, found 8"),
        ({"symmetric": False}, "torch_w4a16", "zero points"),
        ({"group_size": 16}, "torch_w4a16", "found 16"),
        ({"group_size": -1}, "torch_w4a16", "found -1"),
        ({"act_order": True}, "torch_w4a16", "act-order"),
        ({"act_dtype": FP32, "scale_dtype": FP32}, "torch_w4a16", "rounds products"),
        ({"scale_dtype": FP32}, "torch_w4a16", "found torch.float32"),
        ({"n": 4095}, "torch_w4a16", "found 4095"),
    ],
)
def test_cpu_weight_only(changes: dict[str, object], kernel: str, reason: str | None) -> None:
    choice = select_kernel(w4a16("cpu", **changes))
    assert choice.kernel.name == kernel
    refusals = dict(choice.refusals)
    assert refusals["triton_w4a16"] == "needs a GPU, the device is a CPU"
    if reason is not None:
        assert reason in refusals["cpu_int4pack"]


def test_cpu_int8() -> None:
    assert select_kernel(w8a8("cpu", n=7, k=13)).kernel.name == "torch_int_mm"


def test_a_choice_prints_every_reason() -> None:
    text = str(select_kernel(w4a16("cpu", symmetric=False)))
    assert text.splitlines() == [
        "torch_w4a16: plain torch, dequantizes the weight at every call",
        "  not gluon_hopper_w4a16: needs a GPU, the device is a CPU",
        "  not triton_w4a16: needs a GPU, the device is a CPU",
        "  not cpu_int4pack: takes zero points only folded into 16-bit offsets, which rounds them",
    ]


def test_forced_kernel() -> None:
    choice = select_kernel(w4a16(), "torch_w4a16")
    assert choice.kernel.name == "torch_w4a16" and choice.reason == "asked for by name"
    assert dict(choice.refusals)["triton_w4a16"] == "torch_w4a16 was asked for"


@pytest.mark.parametrize(
    ("problem", "kernel", "message"),
    [
        (w4a16(), "cpu_int4pack", "kernel 'cpu_int4pack' cannot run .*runs on a CPU"),
        (w4a16("cpu"), "triton_w4a16", "triton_w4a16: needs a GPU"),
        (w4a16(), "marlin", r"found 'marlin', accepted for w4a16: \['gluon_hopper_w4a16'"),
        (w4a16(), "triton_w8a8_int8", "accepted for w4a16"),
        (w8a8(k=65537), None, "no kernel can run .*K up to 65536.*found 65537"),
        (w4a16(scheme="w4a4"), None, "scheme: found 'w4a4'"),
    ],
)
def test_refusals(problem: LinearProblem, kernel: str | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select_kernel(problem, kernel)


def test_missing_triton_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "triton", None)
    choice = select_kernel(w4a16())
    assert choice.kernel.name == "torch_w4a16"
    assert "pip install triton" in dict(choice.refusals)["triton_w4a16"]


def test_names() -> None:
    w4a16_names, w8a8_names = kernel_names("w4a16"), kernel_names("w8a8_int8")
    assert w4a16_names == ["gluon_hopper_w4a16", "triton_w4a16", "cpu_int4pack", "torch_w4a16"]
    assert w8a8_names[-3:] == ["triton_w8a8_int8", "torch_int_mm", "torch_w8a8_int8"]
    assert kernel_names() == [*w4a16_names, *w8a8_names]


@pytest.mark.parametrize("capability", ["nine", "9", "9.x", ""])
def test_planned_device_refusals(capability: str) -> None:
    with pytest.raises(ValueError, match="capability: found"):
        planned_device(capability)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"scale_dtype": FP32}, "found torch.float32"),
        ({"n": 4104}, "N a multiple of 16, found 4104"),
        ({"k": 4100, "group_size": -1}, "K a multiple of 8, found 4100"),
        ({"group_size": 8}, "found 8"),
        ({"act_dtype": FP32}, "found torch.float32"),
    ],
    ids=str,
)
def test_w4a16_for_hopper_says_what_it_takes(changes: dict[str, object], reason: str) -> None:
    choice = select_kernel(w4a16(**changes))
    assert choice.kernel.name in ("triton_w4a16", "torch_w4a16")
    assert dict(choice.refusals)["gluon_hopper_w4a16"].endswith(reason)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": 4100}, "N a multiple of 8, found 4100"),
        ({"k": 4104}, "K a multiple of 16, found 4104"),
        ({"act_dtype": FP32}, "found torch.float32"),
        ({"device": planned_device("8.9")}, "found 8.9"),
    ],
    ids=str,
)
def test_w8a8_for_hopper_says_what_it_takes(changes: dict[str, object], reason: str) -> None:
    choice = select_kernel(w8a8(**changes))
    assert choice.kernel.name == "triton_w8a8_int8"
    assert dict(choice.refusals)["gluon_hopper_w8a8_int8"].endswith(reason)


def test_configuration_is_told() -> None:
    for kernel, first in (("gluon_hopper_w4a16", "block_m=32"), ("triton_w4a16", "block_m=32")):
        text = select_kernel(w4a16(), kernel).kernel.configuration(w4a16(), 32)
        assert text is not None and text.startswith(first)
    assert select_kernel(w4a16("cpu")).kernel.configuration(w4a16("cpu"), 32) is None


FORMS = [
    w4a16_tuning.Form(bits, block_k, group, group_index)
    for bits in (4, 8)
    for block_k in (64, 128)
    for group in (-1, 16, 32, 64, 128, 256)
    for group_index in (False, True)
]


@pytest.mark.parametrize("capability", [*TRITON_CAPABILITIES, "hip"])
def test_configurations_fit_the_device(capability: str) -> None:
    device = HIP if capability == "hip" else planned_device(capability)
    for m in (1, 16, 17, 64, 65, 128, 129, 65536):
        for form in FORMS:
            config = w4a16_tuning.choose_config(m, form, device)
            assert w4a16_tuning.why_invalid(config, form, device) is None
        for k in (4096, 4090):
            config = w8a8_tuning.choose_config(m, k, device)
            assert w8a8_tuning.why_invalid(config, device) is None


def test_no_configuration_fits() -> None:
    tiny = dataclasses.replace(planned_device("9.0"), name="a toy", shared_memory=1024)
    with pytest.raises(ValueError, match="shared memory of a toy"):
        w4a16_tuning.choose_config(1, FORMS[0], tiny)
    with pytest.raises(ValueError, match="shared memory of a toy"):
        w8a8_tuning.choose_config(1, 64, tiny)
