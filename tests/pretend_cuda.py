"""A pretend GPU: tensors that say cuda:0 and compute on the CPU. It counts what a host would wait for.

  python tests/pretend_cuda.py FOLDER text_to_image train_c ...    # JSON: [[scenario, kind, file:function, count], ...]

What is real: torch's dispatch and autocast for CUDA, and which tensors are where. An operation on tensors of two
devices fails as on a GPU. What is not: time, kernels, memory, streams, and the backward pass, for which torch needs a
real device; here it gives every parameter a gradient of ones. It patches torch, so it runs in a process of its own.
Pinned memory and asynchronous copies are believed, not tried.
"""
import collections
import contextlib
import json
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

ROOT, CUDA = str(Path(__file__).parents[1]) + "/", torch.device("cuda:0")
FOUND, LAUNCHES, PINNED = collections.Counter(), collections.Counter(), {}
SCENARIO, COUNTING = "", False
SIZES_FROM_VALUES = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim",
                     "bincount", "repeat_interleave"}           # their results, or their sizes, are read by the host
COPIES, INDEXED = {"_to_copy", "copy_"}, {"index", "index_put_", "index_put", "_index_put_impl_"}
ONLY_LOOKS = {"view", "_unsafe_view", "permute", "transpose", "t", "expand", "slice", "select", "unsqueeze", "squeeze",
              "split", "split_with_sizes", "detach", "alias", "as_strided", "unbind", "unfold", "lift_fresh", "empty",
              "_reshape_alias", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "is_pinned"}


def note(kind: str) -> None:
    if not COUNTING:
        return
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(ROOT)
              and "/tests/" not in frame.filename]
    names = {frame.name for frame in frames}
    if not names & {"evaluate", "validate", "save", "write_stage_c", "write_stage_b", "write_stage_a"}:
        # These look at a run, at steps of their own.
        place = f"{frames[-1].filename.removeprefix(ROOT)}:{frames[-1].name}" if frames else "?"
        FOUND[SCENARIO, kind, place] += 1


class OnGPU(torch.Tensor):
    """A tensor that says cuda:0; `inner` has its numbers."""
    @staticmethod
    def __new__(cls, inner):
        outer = torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=CUDA)
        outer.inner = inner
        return outer

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})

    def __tensor_flatten__(self):                    # with both of these, torch lets a parameter become one
        return ["inner"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGPU(inner["inner"])


def compute(operation, args, kwargs):
    tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)]
    outer, name = [x for x in tensors if isinstance(x, OnGPU)], operation._schema.name.partition("::")[2]
    asked = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
    if not outer and asked != "cuda":
        return operation(*args, **kwargs)
    foreign = [x for x in tensors if not isinstance(x, OnGPU) and x.dim()]           # a number may be on the CPU
    if outer and foreign and name in INDEXED:
        note("blocking copy of an index")
    elif outer and foreign and name not in COPIES:
        raise RuntimeError(f"Expected all tensors to be on the same device: {operation} of "
                           f"{[(x.device.type, tuple(x.shape)) for x in tensors]}")
    if name in COPIES:
        source, asynchronous = args[name == "copy_"], kwargs.get("non_blocking") or len(args) > 2 and args[2]
        target = asked or outer[0].device.type if name == "_to_copy" else args[0].device.type
        if source.device.type != target:
            pinned = asynchronous and (target == "cpu" or id(source) in PINNED)
            note(f"{'asynchronous' if pinned else 'blocking'} copy to {target}")
    boolean = name in INDEXED and any(x is not None and x.dtype == torch.bool for x in args[1])
    if name in SIZES_FROM_VALUES or boolean:
        note(f"sync: {name}")
    if COUNTING and name not in ONLY_LOOKS:
        LAUNCHES[SCENARIO] += 1
    there = {id(x.inner): x for x in outer}
    kwargs = {key: value for key, value in kwargs.items() if key not in ("pin_memory", "non_blocking")}
    if asked:
        kwargs["device"] = torch.device("cpu")
    args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
    result = operation(*args, **kwargs)
    if asked == "cpu" or name == "copy_" and not isinstance(tensors[0], OnGPU):
        return result
    def wrap(x):
        return there[id(x)] if id(x) in there else OnGPU(x) if isinstance(x, torch.Tensor) else x
    return tree_map(wrap, result)


class Operations(TorchDispatchMode):
    """For those that have no tensor yet."""
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Functions(TorchFunctionMode):
    """What torch does in C++ before it dispatches."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        def one_gpu(x):
            is_cuda = isinstance(x, torch.device) and x.type == "cuda" or isinstance(x, str) and x == "cuda"
            return CUDA if is_cuda else x
        args, kwargs = tuple(one_gpu(x) for x in args), {key: one_gpu(x) for key, x in (kwargs or {}).items()}
        to_cuda = kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda"
        if function in (torch.tensor, torch.as_tensor) and to_cuda and not isinstance(args[0], torch.Tensor):
            note("blocking copy to cuda")
            return OnGPU(function(*args, **kwargs | dict(device="cpu")))
        if function is torch.Tensor.new_tensor and isinstance(args[0], OnGPU):
            note("blocking copy to cuda")
            return OnGPU(torch.tensor(args[1], dtype=kwargs.get("dtype") or args[0].dtype))
        if function is torch.Tensor.tolist and isinstance(args[0], OnGPU):
            note("sync: tolist")
            return args[0].inner.tolist()
        if function is torch.Tensor.numpy and isinstance(args[0], OnGPU):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        if function is torch.Tensor.pin_memory:
            return pin(args[0].clone())
        if function is F.scaled_dot_product_attention and isinstance(args[0], OnGPU):
            return attention(*args, **kwargs)
        return function(*args, **kwargs)


def pin(x: torch.Tensor) -> torch.Tensor:
    PINNED[id(x)] = x                                                # kept, or another tensor would get its id
    return x


def attention(q, k, v, attn_mask=None, dropout_p=0.0):
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (x.to(torch.get_autocast_dtype("cuda")) for x in (q, k, v))
    assert q.dtype == k.dtype == v.dtype, "torch's kernels want one dtype"
    with torch.autocast("cuda", enabled=False):
        scores = q.float() @ k.float().mT * q.shape[-1] ** -0.5
        scores = scores if attn_mask is None else scores.masked_fill(~attn_mask, -float("inf"))
        return (F.dropout(scores.softmax(-1), dropout_p) @ v.float()).to(q.dtype)


def backward(loss: torch.Tensor, *_, **__) -> None:
    """Gradients of ones for what the loss depends on."""
    waiting, seen = [loss.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node in seen or node is None:
            continue
        seen.add(node)
        waiting += [following for following, _ in node.next_functions]
        if hasattr(node, "variable"):
            node.variable.grad = torch.ones_like(node.variable)


class PinnedLoader(torch.utils.data.DataLoader):
    def __iter__(self):
        for batch in super().__iter__():
            yield tree_map(lambda x: pin(x) if isinstance(x, torch.Tensor) and self.pinned else x, batch)

    def __init__(self, *args, pin_memory=False, **kwargs):
        super().__init__(*args, **kwargs)
        self.pinned = pin_memory


def install() -> None:
    """Patches torch for the rest of the process."""
    cuda = torch.cuda
    for name, answer in dict(
            _lazy_init=None, is_available=True, is_initialized=True, device_count=1, current_device=0, set_device=None,
            mem_get_info=(2 ** 37, 2 ** 37), empty_cache=None, max_memory_allocated=0, memory_allocated=0,
            memory_reserved=0, is_bf16_supported=True, manual_seed_all=None, manual_seed=None, current_stream=None,
            is_current_stream_capturing=False, get_device_capability=(9, 0), memory_stats={},
            get_rng_state=torch.zeros(16, dtype=torch.uint8), set_rng_state=None).items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.synchronize = lambda *_: note("sync: synchronize")
    cuda.device = lambda _: contextlib.nullcontext()
    torch._C._cuda_getDevice, torch._C._cuda_getDeviceCount = lambda: 0, lambda: 1
    torch._C._ensureCUDADeviceGuardSet()
    torch.backends.cudnn.enabled = False
    import torch.utils.checkpoint as checkpoint
    checkpoint.get_device_states, checkpoint.set_device_states = lambda *_: ([], []), lambda *_, **__: None
    torch.Tensor.backward, torch.utils.data.DataLoader = backward, PinnedLoader
    Operations().__enter__(), Functions().__enter__()


# ----- scenarios -----------------------------------------------------------------------------------------------------

def counted(function):
    """The function, with what happens inside it counted."""
    def counting(*args, **kwargs):
        global COUNTING
        COUNTING = True
        try:
            return function(*args, **kwargs)
        finally:
            COUNTING = False
    return counting


def sampling(kind: str) -> None:
    """`kind` of an image; only the loops count."""
    import v1.pipeline
    import wuerstchen
    from extras.editing import InitImage, generate
    image = torch.rand(3, 128, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(128, 128)
    mask[32:64, 32:96] = 1
    edit = dict(image_to_image=InitImage(image, 0.8), inpainting=InitImage(image, 1.0, mask)).get(kind)
    model = wuerstchen.Wuerstchen.load("tiny-v1" if kind == "v1" else "tiny", "cuda", "bf16")
    assert all(isinstance(p, OnGPU) for p in model.part("stage_c").parameters())
    wuerstchen.denoise, v1.pipeline.sample = counted(wuerstchen.denoise), counted(v1.pipeline.sample)
    found = generate(model, "a red apple on a blue background", steps_c=3, steps_b=2, guidance_b=2.0, edit=edit)
    assert found[0].size == (128, 128)


def training(script: str, folder: str) -> None:
    """Two steps with one line of the log; what happens between two looks at the run counts."""
    import importlib
    module, more = importlib.import_module(script), []
    if script != "train_a":
        more = ["--weights", "tiny"]
    batches = module.micro_batches

    def micro_batches(*args):
        global COUNTING
        COUNTING = True
        return batches(*args)
    module.micro_batches = micro_batches
    options = ["--data", "scenes:captioned:12:0", "--device", "cuda", "--workers", "0", "--batch", "2", "--steps", "2",
               "--log-every", "2", "--val-count", "1", "--sample-every", "0"]
    module.main(module.parse_args([*more, *options, "--out", f"{folder}/{script}"]))


class Widths(TorchDispatchMode):
    """Notes operations on wide activations: those whose result is float32, and casts."""
    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result, name = operation(*args, **(kwargs or {})), operation._schema.name.partition("::")[2]
        if isinstance(result, torch.Tensor) and result.numel() >= 4096 and name not in ONLY_LOOKS and (
                result.dtype == torch.float32 or name == "_to_copy"):
            FOUND[SCENARIO, name, str(result.dtype)] += 1
        return result


def autocast() -> None:
    """One ResBlock and one AttentionBlock of training on 16 x 16 positions."""
    from stage_c import AttentionBlock, ResBlock
    res, attention = ResBlock(16).to("cuda"), AttentionBlock(16, 16, 2).to("cuda")
    x, text = torch.randn(1, 16, 16, 16).to("cuda"), torch.randn(1, 3, 16).to("cuda")
    with torch.autocast("cuda", torch.bfloat16), Widths():
        attention(res(x), text)


def still_works() -> None:
    """Raises whatever it likes if torch has changed."""
    layer = torch.nn.Linear(2, 2).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y = layer(torch.ones(1, 2, device="cuda"))
    assert isinstance(layer.weight, OnGPU) and y.dtype == torch.bfloat16 and y.cpu().device.type == "cpu"
    y.sum().backward()
    assert layer.weight.grad.device == CUDA


def main(folder: str, *names: str) -> None:
    global SCENARIO, COUNTING
    try:
        install()
        still_works()
    except Exception as error:
        sys.exit(f"torch {torch.__version__} has changed under the pretend device: {error!r}")
    for SCENARIO in names:
        COUNTING = False
        if SCENARIO == "autocast":
            autocast()
        else:
            training(SCENARIO, folder) if SCENARIO.startswith("train") else sampling(SCENARIO)
    COUNTING = False
    print(json.dumps([[*key, count] for key, count in sorted(FOUND.items())]))
    print(json.dumps(LAUNCHES))


if __name__ == "__main__":
    main(*sys.argv[1:])
