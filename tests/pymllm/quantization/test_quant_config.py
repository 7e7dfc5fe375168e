"""The registry of quantization methods and the base class's defaults."""

from __future__ import annotations

import subprocess
import sys
import uuid

import pytest

from pymllm.quantization.quant_config import (
    QuantizationConfig,
    get_quantization_config,
    list_quantization_methods,
    register_quantization,
)


def make_config_class(label: str) -> type[QuantizationConfig]:
    class Minimal(QuantizationConfig):
        def get_name(self):
            return label

        @classmethod
        def from_config(cls, config):
            return cls()

        def get_quant_method(self, layer, prefix=""):
            return None

    return Minimal


@pytest.fixture
def free_name():
    return f"test-{uuid.uuid4().hex}"


def test_register_and_look_up(free_name):
    cls = make_config_class(free_name)
    assert register_quantization(free_name)(cls) is cls
    assert get_quantization_config(free_name) is cls
    assert free_name in list_quantization_methods()


def test_same_class_may_register_again(free_name):
    cls = make_config_class(free_name)
    register_quantization(free_name)(cls)
    register_quantization(free_name)(cls)
    assert get_quantization_config(free_name) is cls


def test_taken_name_is_refused_and_kept(free_name):
    first = register_quantization(free_name)(make_config_class(free_name))
    with pytest.raises(ValueError, match=f"{free_name}.*already registered"):
        register_quantization(free_name)(make_config_class(free_name))
    assert get_quantization_config(free_name) is first


def test_builtin_name_is_taken():
    with pytest.raises(ValueError, match=r"compressed-tensors.*already registered"):
        register_quantization("compressed-tensors")(make_config_class("x"))


def test_only_config_classes_register(free_name):
    with pytest.raises(TypeError, match="QuantizationConfig"):
        register_quantization(free_name)(int)
    assert free_name not in list_quantization_methods()


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'no-such-method'.*'compressed-tensors'"):
        get_quantization_config("no-such-method")


def test_list_is_sorted_and_has_the_builtin():
    names = list_quantization_methods()
    assert "compressed-tensors" in names
    assert names == sorted(names)


@pytest.mark.parametrize(
    "before",
    [
        "",
        # A stranger must not get the name just by coming first.
        """
class Stranger(q.QuantizationConfig): pass
try: q.register_quantization("compressed-tensors")(Stranger)
except ValueError: pass
""",
    ],
    ids=["look-up", "squatter"],
)
def test_builtin_is_found_in_a_fresh_process(before):
    program = (
        "from pymllm.quantization import quant_config as q\n"
        f"{before}\n"
        "print(q.get_quantization_config('compressed-tensors').__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "CompressedTensorsConfig", done.stderr


def test_defaults(free_name):
    cls = make_config_class(free_name)
    config = cls.from_config({})
    assert config.get_supported_act_dtypes() == []
    assert cls.get_min_capability() == 0
    assert cls.get_config_filenames() == ["quantize_config.json"]


def test_base_class_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        QuantizationConfig()
