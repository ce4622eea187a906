"""
Models in Hugging Face's layout: config.json, and model.safetensors or shards with their index.

    read_config    config.json -> the fields of model.ModelConfig
    find_tensors   which file holds which tensor
    load_weights   the files' tensors -> a model, quantised if wanted
    save           a model -> config.json and model.safetensors, for transformers
"""

import math
from pathlib import Path

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.overrides import TorchFunctionMode

from support.fast import rotary
from support.run import progress
from support.run.files import make_folder, malformed, read_json, replacing, write_json
from support.weights.quantized import QuantizedLinear, kind_of, pack

# The values that transformers assumes for keys that config.json leaves out
COMMON = {"num_key_value_heads": None, "head_dim": None, "rms_norm_eps": 1e-6}
MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
QWEN = {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS = {
    "llama": COMMON | {"max_position_embeddings": 2048},
    "mistral": COMMON | MISTRAL,
    "qwen2": COMMON | QWEN,
    "qwen3": COMMON | QWEN | {"head_dim": 128},
}
UNTIED = (
    "note: the config.json of {folder} ties the head to the embeddings, but its files hold another "
    "lm_head.weight, which is used"
)
ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
SIZES = (
    "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads "
    "max_position_embeddings"
).split()


def is_own(folder):
    """Whether model.py computes a folder's model. transformers computes all others."""
    return read_json(folder / "config.json").get("model_type") in list(DEFAULTS)  # any JSON


def own_dtype(folder):
    """bfloat16 if a model's config.json names it, or float32: float16 is slow on CPUs."""
    config = read_json(folder / "config.json")
    named = (config.get("dtype"), config.get("torch_dtype"))
    return torch.bfloat16 if "bfloat16" in named else torch.float32


@malformed("config.json")
def read_config(config_dict):
    """
    The fields of a model.ModelConfig. config_dict: of transformers 4's or 5's config.json. Raises
    ValueError, which names the key, for anything that model.py does not support.
    """
    family = config_dict.get("model_type")
    if family not in DEFAULTS:
        raise ValueError(
            f"config.json: model_type {family!r} is not supported here; the language models are: "
            f"{', '.join(DEFAULTS)}"
        )
    c = DEFAULTS[family] | config_dict
    if c.get("hidden_act", "silu") != "silu":
        raise ValueError(f"config.json: hidden_act {c['hidden_act']!r} is not supported; 'silu' is")
    if c.get("quantization_config"):
        raise ValueError(
            "config.json: the checkpoint is quantised already (quantization_config), which is not "
            "supported: take the unquantised one, and quantise it when it is loaded"
        )

    rope, sizes = read_rope(c), read_sizes(c)
    head_dim = c["head_dim"] or sizes["hidden_size"] // sizes["num_attention_heads"]
    windows = read_windows(c, family, sizes["num_hidden_layers"])
    check_numbers(c, rope, head_dim, windows)

    biased = bool(c.get("attention_bias"))
    return dict(
        **sizes,
        head_dim=head_dim,
        rms_norm_eps=c["rms_norm_eps"],
        rope=rope,
        windows=windows,
        tie_word_embeddings=bool(c.get("tie_word_embeddings")),
        qkv_bias=family == "qwen2" or (family != "mistral" and biased),
        o_bias=family in ("llama", "qwen3") and biased,
        mlp_bias=family == "llama" and bool(c.get("mlp_bias")),
        qk_norm=family == "qwen3",
        hf=dict(config_dict),
    )


def check_numbers(c, rope, head_dim, windows):
    """Raise ValueError for a number that is not positive, or a rope that can't be computed."""
    names = ("rope_theta", "factor", "original_max_position_embeddings")
    positive = [c["rms_norm_eps"], head_dim, *(w for w in windows if w is not None)]
    positive += [rope[name] for name in names if name in rope]
    if type(head_dim) is not int or head_dim % 2 or head_dim > 10**5:  # rotary: pairs
        raise ValueError(f"config.json: head_dim={head_dim!r:.40} is not an even integer up to 1e5")
    numbers = all(type(value) in (int, float) and 0 < value < 1e12 for value in positive)
    whole = all(isinstance(window, int | None) for window in windows)
    if not numbers or not whole or len(windows) != c["num_hidden_layers"]:
        raise ValueError(
            f"config.json: rms_norm_eps, head_dim, sliding_window (an integer) and the rope's "
            f"numbers must be positive and below 1e12, not {str(positive):.200}"
        )
    try:
        _, scale = rotary.frequencies(rope, head_dim)  # fails on the rope's other numbers
        float(scale)
    except (KeyError, TypeError, ArithmeticError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"config.json: rotary positions {rope}: {error} is missing or not a number"
        ) from None


def read_rope(c):
    """The rope settings in one spelling: rope_type, rope_theta, and the numbers the type needs."""
    rope = c.get("rope_scaling") or c.get("rope_parameters") or {}
    plain = isinstance(rope, dict) and not any(isinstance(v, dict) for v in rope.values())
    rope = {"rope_theta": c.get("rope_theta") or 10000.0, **rope} if plain else {"rope_type": rope}
    rope["rope_type"] = rope.get("rope_type") or rope.get("type") or "default"
    whole = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1)) == 1
    if rope["rope_type"] not in ROPE_TYPES or not whole:
        raise ValueError(
            f"config.json: rotary positions {rope} are not supported; these rope types are, the "
            f"same in all layers and over whole heads: {', '.join(ROPE_TYPES)}"
        )

    name, most = "original_max_position_embeddings", c["max_position_embeddings"]
    rope[name] = c.get(name) or rope.get(name) or most
    if rope["rope_type"] == "yarn" and rope.get("factor", 1) is None:
        rope["factor"] = most / rope[name]
    return rope


def read_sizes(c):
    sizes = {name: c.get(name) for name in SIZES}
    sizes["num_key_value_heads"] = c["num_key_value_heads"] or sizes["num_attention_heads"]
    for name, value in sizes.items():
        if name not in c:
            raise ValueError(f"config.json: {name!r} is missing")
        if type(value) is not int or value < 1:
            raise ValueError(f"config.json: {name}={value!r:.40} must be a positive integer")
        # Beyond such sizes, torch can't even describe tensors.
        most = 1000 if name == "num_hidden_layers" else 10**8
        if value > most:
            raise ValueError(f"config.json: {name}={value} is more than {most}")
    heads, groups = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    if heads % groups:
        raise ValueError(f"config.json: {groups} key-value heads do not divide {heads} heads")
    return sizes


def read_windows(c, family, layers):
    """How many tokens each layer sees, with the current one, as a list; None: all of them."""
    if family in ("llama", "mistral"):  # transformers ignores a llama's windows
        return [c["sliding_window"] if family == "mistral" else None] * layers
    full, sliding = "full_attention", "sliding_attention"
    types = c.get("layer_types") or [  # Qwen's first layers see everything
        full if i < c["max_window_layers"] else sliding for i in range(layers)
    ]
    if unknown := [t for t in types if t not in (full, sliding)]:
        known = f"{full!r} and {sliding!r} are"
        raise ValueError(f"config.json: layer_types {unknown[0]!r} is not supported; {known}")
    window = c["sliding_window"] if c.get("use_sliding_window") else None
    return [window if t == sliding else None for t in types]


def find_tensors(folder):
    """{name: (file, shape)} of a folder's tensors. Raises FileNotFoundError or ValueError."""
    index = folder / "model.safetensors.index.json"
    tensors = {}
    for path in weight_files(folder, index):
        if not path.exists():
            listed = f", though {index.name} lists it: download it too" if index.exists() else ""
            raise FileNotFoundError(f"{path} is missing{listed}")

        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():
                    if not key.endswith("rotary_emb.inv_freq"):  # in old LLaMA files, not needed
                        tensors[key] = path, tuple(file.get_slice(key).get_shape())
        except SafetensorError as error:
            problem = f"damaged or not a safetensors file ({error}): download it again"
            with open(path, "rb") as file:
                if file.read(40).startswith(b"version https://git-lfs"):
                    problem = "a git-lfs pointer, not the weights: fetch them with `git lfs pull`"
            raise ValueError(f"{path} is {problem}") from None
    return tensors


def weight_files(folder, index):
    """The paths of a folder's safetensors files, also missing ones. index: their index's path."""
    single = folder / "model.safetensors"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: weight_map is missing or empty")
        names = sorted(set(map(str, weight_map.values())))
        for name in names:
            if Path(name).name != name or not name.endswith(".safetensors"):
                raise ValueError(
                    f"{index}: {name!r} does not name a safetensors file in this folder"
                )
        return [folder / name for name in names]

    if not single.exists() and any(folder.glob("*.bin")):
        raise FileNotFoundError(
            f"{folder} holds its weights as .bin files only. Those are pickles, which can run any "
            f"code when they are opened, so they are not read: take the model's safetensors files"
        )
    if not single.exists() and any(folder.glob("model-*.safetensors")):
        raise FileNotFoundError(f"{index} is missing, though shards are there: download it too")
    return [single]


def untie(config, stored, folder):
    """Drop a tied head from the stored tensors. If it differs, untie it, as transformers does."""
    both = [name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in stored]
    if len(both) == 2:  # some files hold the shared matrix twice
        head, embeddings = (safe_open(stored[name][0], "pt").get_tensor(name) for name in both)
        if not torch.equal(head, embeddings):
            print(UNTIED.format(folder=folder))
            config.tie_word_embeddings = config.hf["tie_word_embeddings"] = False
            return
    head = stored.pop("lm_head.weight", None)
    if head:  # safetensors' save_model keeps one name
        stored.setdefault("model.embed_tokens.weight", head)


def check_tensors(stored, expected, folder):
    """Raise ValueError unless the stored tensors are the expected ones, {name: shape}."""
    for key, shape in expected.items():
        if key not in stored:
            raise ValueError(f"{folder}: tensor {key} is missing")
        if stored[key][1] != shape:
            raise ValueError(
                f"{folder}: tensor {key} is {stored[key][1]}, but config.json says {shape}"
            )
    if unexpected := sorted(stored.keys() - expected.keys()):
        more = len(unexpected) - 1
        raise ValueError(f"{folder}: unexpected tensor {unexpected[0]} (and {more} more)")


class WithoutValues(TorchFunctionMode):
    """A context without torch.nn.init: random values on "meta" would import torch's compiler."""

    def __torch_function__(self, function, types, arguments=(), named=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return named["tensor"]
        return function(*arguments, **(named or {}))


def load_weights(model, folder, dtype, device, quantize=None, mapped=False):
    """Load weights into a Transformer on the meta device, for Transformer.from_pretrained."""
    stored = find_tensors(folder)
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        untie(model.config, stored, folder)
    if tied := model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    check_tensors(stored, expected, folder)

    # Closing the file after each tensor releases its pages, and the largest tensor comes first, so
    # memory never holds more than one tensor twice.
    keys = sorted(expected, key=lambda key: -math.prod(expected[key]))
    for key in progress.over(keys, "load the model", "tensor"):
        with safe_open(stored[key][0], framework="pt") as file:
            name = key if key in file.keys() else "lm_head.weight"
            tensor = file.get_tensor(name).to(device, dtype, copy=not mapped)
        path, _, name = key.rpartition(".")
        layer = model.get_submodule(path)
        linear = isinstance(layer, nn.Linear) and layer is not model.lm_head
        if quantize and linear and name == "weight":
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            model.set_submodule(path, QuantizedLinear(*sizes, pack(tensor, quantize)))
        else:
            setattr(layer, name, nn.Parameter(tensor))

    if tied:
        model.lm_head.weight = model.model.embed_tokens.weight


def save(model, folder):
    """Write a Transformer without adapters and packed weights, for its save_pretrained."""
    state = model.state_dict(keep_vars=True)
    if any("lora_" in key or kind_of(value) for key, value in state.items()):
        raise ValueError("the model holds adapters or packed weights: call merge(model) first")

    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    write(folder, model.config.hf, state, model.lm_head.weight.dtype)


def write(folder, config, tensors, dtype):
    """Write config.json from its dict, and model.safetensors. dtype: what config.json names."""
    folder = make_folder(folder)
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    config = {key: value for key, value in config.items() if key != "torch_dtype"}  # its old name
    config["dtype"] = str(dtype).removeprefix("torch.")

    with replacing(folder / "model.safetensors") as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    write_json(folder / "config.json", config)
    # An index that is there belongs to another model's shards.
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
