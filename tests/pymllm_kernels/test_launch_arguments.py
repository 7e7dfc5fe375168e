"""What the Hopper launchers pass to the driver, seen without a GPU: addresses, sizes, workspaces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from pymllm_kernels import ops, planned_device
from pymllm_kernels.common import launcher
from pymllm_kernels.gather_inputs import launch as gather
from pymllm_kernels.per_token_quant_int8 import launch as quant
from pymllm_kernels.tuning import resolve, state
from pymllm_kernels.w4a16 import hopper_decode_launch, hopper_launch
from pymllm_kernels.w4a16.hopper_tuning import HopperConfig
from pymllm_kernels.w4a16.tunable import HOPPER as W4A16
from pymllm_kernels.w4a16.tunable import hopper_key
from pymllm_kernels.w8a8_int8 import hopper_decode_launch as w8a8_decode_launch
from pymllm_kernels.w8a8_int8 import hopper_fused_launch as w8a8_fused_launch
from pymllm_kernels.w8a8_int8 import hopper_launch as w8a8_launch

BF16, FP32 = torch.bfloat16, torch.float32
HOPPER = planned_device("9.0")


class Kernel:
    """Stands for a loaded kernel: its parameters by name, as the driver would get them."""

    launches: list[tuple[str, int, dict[str, Any]]] = []  # noqa: RUF012

    def __init__(self, form: Any, device: torch.device) -> None:
        self.form = form
        names = [name for name in form.kernel.arg_names if name in form.signature]
        self.maps = [name for name in names if form.signature[name].startswith("tensordesc")]
        self.values = [name for name in names if name not in self.maps]
        self.described = [{"block_size": name, "swizzle": 0} for name in self.maps]

    def bind(self, maps: Any = (), sizes: Any = ()) -> Callable[..., None]:
        def launch(programs: int, stream: int, items: Any, values: Any) -> None:
            assert stream == 5
            # What is launched is what was bound.
            assert [item[:-1] for item in items] == [one.made for one in maps]
            given = dict(zip(self.maps, items, strict=True))
            given |= dict(zip(self.values, (*values, *sizes), strict=True))
            Kernel.launches.append((self.form.name, programs, given))

        return launch

    def launch(self, *arguments: Any) -> None:
        self.bind()(*arguments)


class Maps:
    """Stands for tensor maps: the box they were made for, shape, strides and address."""

    def __init__(self, described: Any, dtype: Any, shape: Any, strides: Any) -> None:
        self.made = (described["block_size"], dtype, tuple(shape), tuple(strides))

    def __getitem__(self, address: int) -> Any:
        return (*self.made, address)


@pytest.fixture(autouse=True)
def driver(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    counters = torch.zeros(528, dtype=torch.int32)
    modules: tuple[Any, ...] = (
        hopper_launch, hopper_decode_launch, w8a8_launch, w8a8_decode_launch, w8a8_fused_launch, quant,
        gather,
    )  # fmt: skip
    for module in modules:
        monkeypatch.setattr(module, "load", Kernel)
        monkeypatch.setattr(module, "raw_stream", lambda index: 5, raising=False)
        monkeypatch.setattr(module, "device_facts", lambda device: HOPPER, raising=False)
        monkeypatch.setattr(module, "TensorMaps", Maps, raising=False)
        monkeypatch.setattr(module, "counters", lambda device: counters, raising=False)
        monkeypatch.setattr(module, "_PREPARED", {}, raising=False)
    monkeypatch.setattr(launcher.cuda, "raw_stream", lambda index: 5)
    monkeypatch.setattr(launcher.cuda, "current_device", lambda: -1)
    monkeypatch.setattr(
        launcher.cuda, "empty", lambda shape, strides, dtype: torch.empty(shape, dtype=dtype)
    )
    monkeypatch.setattr(Kernel, "launches", [])
    cached: list[Any] = [
        hopper_launch._loaded, hopper_launch._kernel, hopper_decode_launch._kernel,
        w8a8_launch._loaded, w8a8_launch._gemm, w8a8_decode_launch._kernel, w8a8_fused_launch._kernel,
        quant.loaded, gather._kernel,
    ]  # fmt: skip
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def w4a16(m: int, n: int = 4096, k: int = 4096, **more: Any) -> dict[str, torch.Tensor]:
    given = {
        "x": torch.empty(m, k, dtype=BF16),
        "weight": torch.empty(k // 128, n, 32, dtype=torch.int16),
        "scale": torch.empty(k // 128, n, dtype=BF16),
        "zero": torch.empty(k // 128, n, dtype=torch.int8),
        "bias": torch.empty(n, dtype=FP32),
        "out": torch.empty(m, n, dtype=BF16),
    }
    hopper_launch.launch(
        given["x"], given["weight"], given["scale"], given["zero"], given["bias"], given["out"],
        group_size=128, **more,
    )  # fmt: skip
    return given


@pytest.mark.parametrize("m", [1, 7, 16])
def test_few_tokens(m: int) -> None:
    t = w4a16(m)
    ((name, programs, given),) = Kernel.launches
    assert "decode" in name and programs == 132
    addresses = {f"{key}_ptr": t[key].data_ptr() for key in t}
    # 256 row blocks: one for every program, two for 124 of them.
    sizes = {"M": m, "N": 4096, "K": 4096, "groups": 32, "stride_x8": 512, "share": 1, "more": 124}
    assert given == addresses | sizes


def test_few_tokens_in_act_order() -> None:
    weight, scale = torch.empty(32, 4096, 32, dtype=torch.int16), torch.empty(32, 4096, dtype=BF16)
    out, perm = torch.empty(3, 4096, dtype=BF16), torch.randperm(4096).to(torch.int32)
    # Any strides: what is gathered is contiguous.
    x = torch.randn(6, 8193).to(BF16)[::2, 1:8193:2]
    hopper_launch.launch(x, weight, scale, None, None, out, group_size=128, perm=perm)
    (name, programs, given), (decode, _, next_given) = Kernel.launches
    assert name == "gather-inputs-strided" and programs == 8 * 3
    assert decode.endswith("act-order")
    gathered = given.pop("out_ptr")
    assert given == {
        "x_ptr": x.data_ptr(), "perm_ptr": perm.data_ptr(), "k8": 512, "stride_xm": 2 * 8193,
        "stride_xk": 2,
    }  # fmt: skip
    assert (next_given["x_ptr"], next_given["stride_x8"]) == (gathered, 512)


def test_one_token_in_act_order() -> None:
    """One launch, which reads the token where it is; two where it has gaps or is not on 16 bytes."""
    weight, scale = torch.empty(32, 4096, 32, dtype=torch.int16), torch.empty(32, 4096, dtype=BF16)
    out, perm = torch.empty(1, 4096, dtype=BF16), torch.randperm(4096).to(torch.int32)
    wide = torch.randn(3, 8192 + 16).to(BF16)
    for x in (wide[1:2, 8:4104], wide[1, 8:4104].view(1, 4096), wide[1:2, 8:4104].contiguous()):
        hopper_launch.launch(x, weight, scale, None, None, out, group_size=128, perm=perm)
        ((name, programs, given),) = Kernel.launches
        assert name.startswith("w4a16-decode") and name.endswith("kept-act-order-4096")
        assert programs == 132
        addresses = {"x_ptr": x, "perm_ptr": perm, "weight_ptr": weight, "scale_ptr": scale}
        assert given == {name: t.data_ptr() for name, t in addresses.items()} | {
            "out_ptr": out.data_ptr(), "M": 1, "N": 4096, "K": 4096, "groups": 32,
            "stride_x8": 512, "share": 1, "more": 124,
        }  # fmt: skip
        Kernel.launches.clear()
    for x in (wide[1:2, 1:4097], wide[1:2, :8192:2]):
        hopper_launch.launch(x, weight, scale, None, None, out, group_size=128, perm=perm)
        (gathering, _, _), (name, _, given) = Kernel.launches
        assert gathering == "gather-inputs-strided" and name.endswith("act-order")
        assert "perm_ptr" not in given
        Kernel.launches.clear()


@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize("k", [4096, 32768])
def test_forms_are_what_a_call_in_act_order_launches(m: int, k: int) -> None:
    weight, scale = torch.empty(k // 128, 256, 32, dtype=torch.int16), torch.empty(k // 128, 256)
    perm, x = torch.arange(k, dtype=torch.int32), torch.empty(m, k, dtype=BF16)
    key = hopper_key(256, k, 128, BF16, BF16, True, 4, act_order=True)
    config = resolve(W4A16, key, m, HOPPER).config
    hopper_launch.launch(x, weight, scale.to(BF16), None, None, group_size=128, perm=perm)
    layer = hopper_launch.HopperLayer(256, k, 128, 128, BF16, BF16, False, None, True)
    declared = [form.specialization().name for form in hopper_launch.forms(layer, config)]
    assert declared == [name for name, _, _ in Kernel.launches]


def test_activations_in_act_order_start_anywhere() -> None:
    """The same shape and strides, on 16 bytes and beside: another form each, told by the address."""
    memory = torch.empty(3 * 4096 + 8, dtype=BF16)
    names = []
    for off in (0, 1, 0):
        x = memory[off : off + 3 * 4096].view(3, 4096)
        weight, scale = torch.empty(32, 4096, 32, dtype=torch.int16), torch.empty(32, 4096).to(BF16)
        perm = torch.arange(4096, dtype=torch.int32)
        hopper_launch.launch(x, weight, scale, None, None, group_size=128, perm=perm)
        names.append(Kernel.launches[-2][0])
        assert Kernel.launches[-2][2]["x_ptr"] == x.data_ptr()
    assert names == ["gather-inputs-4096", "gather-inputs-strided", "gather-inputs-4096"]


@pytest.mark.parametrize("m", [40, 2000])
def test_tiles_in_act_order(m: int) -> None:
    t = w4a16(m, perm=torch.arange(4096, dtype=torch.int32))
    (name, programs, given), (tiles, _, next_given) = Kernel.launches
    # Two programs a row.
    assert name == "gather-inputs-4096" and programs == 2 * m and given["stride_xm"] == 4096
    assert given["x_ptr"] == t["x"].data_ptr()
    # Many tokens wait until they are gathered, in the form of layers without an order.
    assert ("act-order" in tiles) == (m == 40)
    assert next_given["x_desc"][1:] == (BF16, (m, 4096), (4096, 1), given["out_ptr"])
    w4a16(m)
    assert hopper_launch._kernel.cache_info().misses == (2 if m == 40 else 1)


@pytest.mark.parametrize("m", [100, 1000])
def test_tiles(m: int) -> None:
    # The rule shares tiles of so many tokens for other layers.
    shared = HopperConfig(128, 2, slots=4, meet=True, out_parts=2, share=4)
    t = w4a16(m, config=shared if m == 100 else None)
    ((name, programs, given),) = Kernel.launches
    address = {key: tensor.data_ptr() for key, tensor in t.items()}
    assert given["x_desc"] == ("x_desc", BF16, (m, 4096), (4096, 1), address["x"])
    assert given["weight_desc"][1:] == (torch.int16, (32 * 4096, 32), (32, 1), address["weight"])
    assert given["scale_desc"][1:] == (BF16, (32 * 4096,), (1,), address["scale"])
    assert given["zero_desc"][1:] == (torch.int8, (32 * 4096,), (1,), address["zero"])
    assert given["out_desc"][1:] == (BF16, (m, 4096), (4096, 1), address["out"])
    assert (given["out_ptr"], given["bias_ptr"]) == (address["out"], address["bias"])
    assert (given["M"], given["N"], given["groups"], given["stride_om"]) == (m, 4096, 32, 4096)
    assert ("part_ptr" in given) == ("shared" in name) == (m == 100)
    assert programs == 128


def test_a_launch_is_prepared_once_for_many_addresses() -> None:
    first, second = w4a16(40), w4a16(40)
    assert len(hopper_launch._PREPARED) == 1
    (_, _, a), (_, _, b) = Kernel.launches
    assert (a["x_desc"][-1], b["x_desc"][-1]) == (first["x"].data_ptr(), second["x"].data_ptr())


@pytest.mark.parametrize("m", [1, 100])
def test_every_call_reads_the_weight_anew(m: int) -> None:
    """Tensors may be moved or replaced between calls: addresses are not kept, a new dtype is seen."""
    x, weight = torch.empty(m, 4096, dtype=BF16), torch.empty(32, 4096, 32, dtype=torch.int16)
    scale = torch.empty(32, 4096, dtype=BF16)

    def launched(x: torch.Tensor, bias: torch.Tensor | None = None) -> dict[str, Any]:
        out = ops.w4a16_gemm_hopper(x, weight, scale, None, None, bias, 128)
        assert (out.shape, out.dtype) == ((*x.shape[:-1], 4096), x.dtype)
        given: dict[str, Any] = Kernel.launches[-1][2]
        return {name: v[-1] if name.endswith("_desc") else v for name, v in given.items()}

    kind = "ptr" if m == 1 else "desc"
    assert launched(x)[f"weight_{kind}"] == weight.data_ptr()
    weight.data, scale.data = weight.clone(), scale.clone()
    given = launched(x.view(1, m, 4096))
    assert given[f"weight_{kind}"] == weight.data_ptr()
    assert given[f"scale_{kind}"] == scale.data_ptr()
    for bias in (torch.empty(4096, dtype=BF16), torch.empty(4096), torch.empty(8192)[::2]):
        given = launched(x, bias)
        assert (given["bias_ptr"] == bias.data_ptr()) == (bias.stride(0) == 1)
    assert [layer.act for layer, *_ in hopper_launch._PREPARED] == [BF16] * 3
    launched(x.to(torch.float16))
    assert [layer.act for layer, *_ in hopper_launch._PREPARED] == [BF16] * 3 + [torch.float16]


def test_a_new_configuration_is_seen() -> None:
    """The next call of a layer that has been called takes what was pinned meanwhile."""
    w4a16(1)
    key = hopper_key(4096, 4096, 128, BF16, BF16, symmetric=False, bits=4)
    config = HopperConfig(block_m=8, consumers=2, slots=4, span=2, share=4)
    with state.pinned_for_now(W4A16, key, config):
        w4a16(1)
    w4a16(1)
    names = [name for name, _, _ in Kernel.launches]
    assert ["decode" in name for name in names] == [True, False, True]


def test_strided_and_unaligned_rows() -> None:
    weight, scale = torch.empty(32, 4096, 32, dtype=torch.int16), torch.empty(32, 4096, dtype=BF16)
    out = torch.empty(3, 4096, dtype=BF16)
    wide = torch.randn(6, 8192).to(BF16)

    def launched(x: torch.Tensor) -> dict[str, Any]:
        hopper_launch.launch(x, weight, scale, None, None, out[: x.shape[0]], group_size=128)
        given: dict[str, Any] = Kernel.launches[-1][2]
        return given

    view = wide[::2, 8:4104]
    given = launched(view)
    assert (given["x_ptr"], given["stride_x8"]) == (view.data_ptr(), 2 * 8192 // 8)
    # Off 16 bytes, or with gaps: copied.
    for odd in (wide[::2, 1:4097], wide[:3, ::2]):
        given = launched(odd)
        assert given["x_ptr"] != odd.data_ptr() and given["stride_x8"] == 512
    one = launched(wide[4:5, 8:4104])
    assert (one["x_ptr"], one["stride_x8"]) == (wide[4:5, 8:4104].data_ptr(), 512)


def w8a8(m: int, n: int, k: int, *, symmetric: bool = True, static: bool = False) -> dict[str, Any]:
    t: dict[str, Any] = {
        "x": torch.empty(m, k, dtype=BF16), "weight": torch.empty(n, k, dtype=torch.int8),
        "w_scale": torch.empty(n), "column_sum": None if symmetric else torch.empty(n, dtype=torch.int32),
        "input_scale": torch.empty(1) if static else None,
        "input_zero": torch.empty(1, dtype=torch.int32) if static and not symmetric else None,
        "bias": torch.empty(n, dtype=BF16), "out": torch.empty(m, n, dtype=BF16),
    }  # fmt: skip
    w8a8_launch.launch_linear(
        t["x"], t["weight"], t["w_scale"], t["column_sum"], t["input_scale"], t["input_zero"],
        t["bias"], t["out"], symmetric=symmetric,
    )  # fmt: skip
    return t


@pytest.mark.parametrize("m", [20, 60, 300])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_int8(m: int, symmetric: bool, static: bool) -> None:
    n, k = 4096, 14336
    t = w8a8(m, n, k, symmetric=symmetric, static=static)
    (_, rows, quantized), (name, _, given) = Kernel.launches
    # A program a row, or 2048 values of it where nothing has to be found first.
    assert rows == (7 * m if static else m) and quantized["x_ptr"] == t["x"].data_ptr()
    assert (quantized["K"], quantized["stride_xm"], quantized["stride_cm"]) == (k, k, k)
    # What the first kernel writes is what the second reads.
    codes, scale = quantized["codes_ptr"], quantized["scale_ptr"]
    assert given["x_desc"] == ("x_desc", torch.int8, (m, k), (k, 1), codes)
    assert given["x_scale_ptr"] == scale
    assert static == (scale == (t["input_scale"].data_ptr() if static else None))
    assert ("zero_ptr" in quantized) == ("x_zero_ptr" in given) == (not symmetric)
    if not symmetric:
        assert given["x_zero_ptr"] == quantized["zero_ptr"]
        assert given["column_sum_ptr"] == t["column_sum"].data_ptr()
    assert given["weight_desc"][1:] == (torch.int8, (n, k), (k, 1), t["weight"].data_ptr())
    assert given["out_desc"][1:] == (BF16, (m, n), (n, 1), t["out"].data_ptr())
    assert given["w_scale_ptr"] == t["w_scale"].data_ptr() and given["stride_om"] == n
    assert given["bias_ptr"] == t["bias"].data_ptr()
    assert ("part_ptr" in given) == ("whole" not in name)


def test_the_int8_workspace_holds_everything_apart() -> None:
    """Codes, scales, zero points, counters and parts of one call do not overlap, each on 256 bytes."""
    from pymllm_kernels.w8a8_int8.hopper_tuning import HopperConfig

    m, n, k = 50, 4096, 8192
    config = HopperConfig(64, 128, 128, 6, swap=True, consumers=1, share=2, meet=True)
    x, out = torch.empty(m, k, dtype=BF16), torch.empty(m, n, dtype=BF16)
    w8a8_launch.launch_linear(
        x, torch.empty(n, k, dtype=torch.int8), torch.empty(n), torch.empty(n, dtype=torch.int32), None,
        None, None, out, symmetric=False, config=config,
    )  # fmt: skip
    (_, _, first), (_, _, second) = Kernel.launches
    prepared = next(iter(w8a8_launch._PREPARED.values()))
    start = first["codes_ptr"]
    order = [first["scale_ptr"], first["zero_ptr"], first["counters_ptr"], second["part_ptr"]]
    sizes = [m * k, 4 * m, 4 * m, 4 * first["counters"]]
    ends = [a + s for a, s in zip([start, *order[:-1]], sizes, strict=True)]
    assert all(end <= begin for end, begin in zip(ends, order, strict=True))
    assert all((place - start) % 256 == 0 for place in order)
    assert second["count_ptr"] == first["counters_ptr"] and first["counters"] > 0
    assert order[-1] - start < prepared._quantize._bytes


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("static", [True, False])
def test_int8_of_two_tokens_is_one_launch(symmetric: bool, static: bool) -> None:
    n, k = 4096, 4096
    t = w8a8(2, n, k, symmetric=symmetric, static=static)
    ((name, programs, given),) = Kernel.launches
    assert "fused" in name and programs in (64, 128)
    assert given.pop("weight_desc")[1:] == (torch.int8, (n, k), (k, 1), t["weight"].data_ptr())
    names = {
        "x": "x", "input_scale": "x_scale", "input_zero": "x_zero", "w_scale": "w_scale",
        "column_sum": "column_sum", "bias": "bias", "out": "out",
    }  # fmt: skip
    addresses = {f"{b}_ptr": t[a].data_ptr() for a, b in names.items() if t[a] is not None}
    assert given == addresses | {"M": 2, "stride_xm": k}


def test_int8_of_two_tokens_is_read_in_place() -> None:
    n, k = 4096, 4096
    weight, scale, out = (
        torch.empty(n, k, dtype=torch.int8),
        torch.empty(n),
        torch.empty(2, n, dtype=BF16),
    )
    wide = torch.randn(6, 2 * k + 8).to(BF16)
    for x, strides in (
        (wide[::2, 8 : 8 + k][:2], {"stride_xm": 2 * (2 * k + 8)}),
        (wide[:2, 1 : 1 + k], {"stride_xm": 2 * k + 8, "stride_xk": 1}),
        (wide[:2, : 2 * k : 2], {"stride_xm": 2 * k + 8, "stride_xk": 2}),
    ):
        w8a8_launch.launch_linear(x, weight, scale, None, None, None, None, out, symmetric=True)
        ((_, _, given),) = Kernel.launches
        assert given["x_ptr"] == x.data_ptr() and strides.items() <= given.items()
        assert ("stride_xk" in strides) == ("stride_xk" in given)
        Kernel.launches.clear()


@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_int8_of_few_tokens_of_a_small_layer(symmetric: bool, static: bool) -> None:
    n, k = 2048, 2048
    t = w8a8(5, n, k, symmetric=symmetric, static=static)
    (_, rows, quantized), (_, _, given) = Kernel.launches
    assert rows == 5 and quantized["x_ptr"] == t["x"].data_ptr()
    assert given["x_ptr"] == quantized["codes_ptr"] and given["M"] == 5
    assert given["x_scale_ptr"] == quantized["scale_ptr"]
    assert given.get("x_zero_ptr") == quantized.get("zero_ptr")


@pytest.mark.parametrize("call", [lambda: w4a16(0), lambda: w8a8(0, 4096, 4096)])
def test_nothing_is_launched_for_no_tokens(call: Callable[[], object]) -> None:
    call()
    assert Kernel.launches == []


def test_a_bias_with_gaps_is_made_dense() -> None:
    values = torch.randn(20)
    assert ops._dense(None) is None
    assert ops._dense(values) is values
    dense = ops._dense(values[::2])
    assert dense is not None and dense.stride(0) == 1 and torch.equal(dense, values[::2])


@pytest.mark.parametrize("off", [0, 4])
def test_plain_kernels_do_not_assume_where_tensors_start(off: int) -> None:
    from pymllm_kernels.w4a16 import launch as w4a16_launch
    from pymllm_kernels.w4a16.tuning import Config, Form
    from pymllm_kernels.w8a8_int8 import launch as plain_w8a8

    seen: list[Any] = []
    memory = torch.empty(64 * 256 + 8, dtype=BF16)
    out, scale = memory[off:][: 4 * 64].view(4, 64), torch.empty(2, 64, dtype=BF16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(w4a16_launch, "_LAUNCHER", lambda form, *_: seen.append(form))
        patch.setattr(plain_w8a8, "_LAUNCHER", lambda form, *_: seen.append(form))
        w4a16_launch.launch(
            torch.empty(4, 256, dtype=BF16), torch.empty(2, 64, 32, dtype=torch.int16), scale, None,
            None, None, None, out, bits=4, group_size=128, config=Config(16, 64, 4, 2),
        )  # fmt: skip
        codes, weight = (torch.empty(rows, 256, dtype=torch.int8) for rows in (4, 64))
        plain_w8a8.launch(codes, weight, torch.empty(4, 1), torch.empty(64), None, None, None, out)
    assert seen[0].form == Form(4, 128, 128)
    forms = (w4a16_launch.specialization(seen[0]), plain_w8a8.specialization(seen[1]))
    for form in forms:
        assert ("out_ptr" in form.divisible_by_16) == (off == 0)
        assert "x_ptr" in form.divisible_by_16
