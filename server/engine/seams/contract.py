"""What polyhelm relies on in vLLM, and whether a vLLM has it: judged by its Python sources, in about a second.

    python -m server.engine.seams.contract [FOLDER]

FOLDER holds `vllm/`, as an unpacked wheel does; without one the installed vLLM is read. Exit code 0: nothing differs.

Imports, `wrap` calls and keyword arguments are read from polyhelm's own sources, so that they can't be forgotten here.
What needs a type to be known is listed below.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from server.engine.seams.sources import Sources, parameters

ENGINE = Path(__file__).parents[1]

# The class of what a module of ours handles, and the attributes that it reads, sets or calls.
ATTRIBUTES: dict[str, dict[str, str]] = {
    "admission": {
        "vllm.v1.engine.EngineCoreRequest": "prompt_token_ids resumable sampling_params",
        "vllm.sampling_params.SamplingParams": "extra_args max_tokens",
    },
    "client": {
        "vllm.v1.engine.async_llm.AsyncLLM": "engine_core errored generate get_tokenizer model_config output_handler "
        "vllm_config",
        "vllm.v1.engine.core_client.AsyncMPClient": "_call_utility_async core_engines",
        "vllm.config.ModelConfig": "architectures dtype get_vocab_size max_model_len served_model_name",
        "vllm.sampling_params.SamplingParams": "clone extra_args output_kind skip_reading_prefix_cache",
        "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest": "cache_salt vllm_xargs",
        "vllm.entrypoints.openai.completion.protocol.CompletionRequest": "cache_salt vllm_xargs",
    },
    "core": {
        "vllm.v1.engine.core.EngineCore": "collective_rpc model_executor scheduler vllm_config",
        "vllm.v1.engine.core.EngineCoreProc": "output_queue",
        "vllm.v1.engine.EngineCoreRequest": "client_index request_id sampling_params",
        "vllm.v1.engine.FinishReason": "ERROR",
    },
    "endpoint": {
        "vllm.entrypoints.openai.models.serving.OpenAIServingModels": "base_model_paths",
        "vllm.entrypoints.openai.models.protocol.BaseModelPath": "name",
        "vllm.config.ModelConfig": "model",
        "vllm.plugins.endpoint_plugins.interface.EndpointPlugin": "attach_router init_state name required_tasks",
    },
    "engine_config": {"vllm.engine.arg_utils.EngineArgs": "additional_config"},
    "frontend": {
        "vllm.engine.arg_utils.AsyncEngineArgs": "aggregate_engine_logging disable_log_stats enable_log_requests",
        "vllm.v1.engine.async_llm.AsyncLLM": "get_supported_tasks model_config shutdown vllm_config",
        "vllm.config.VllmConfig": "additional_config shutdown_timeout",
        "vllm.entrypoints.launchers.cli_args.FrontendArgs": "disable_uvicorn_access_log",
        # The handlers that server/api/openai.py stands before.
        "vllm.entrypoints.openai.chat_completion.serving.OpenAIServingChat": "create_chat_completion",
        "vllm.entrypoints.openai.completion.serving.OpenAIServingCompletion": "create_completion",
    },
    "install": {"vllm.config.VllmConfig": "model_config use_v2_model_runner"},
    "offline": {
        "vllm.v1.engine.core_client.InprocClient": "engine_core",
        "vllm.v1.engine.core_client.SyncMPClient": "call_utility",
        "vllm.v1.engine.llm_engine.LLMEngine": "engine_core",
    },
    "points": {"vllm.model_executor.layers.linear.RowParallelLinear": "input_size input_size_per_partition"},
    "prefix_key": {"vllm.v1.request.Request": "num_prompt_tokens sampling_params"},
    "probe": {
        "vllm.config.CacheConfig": "block_size enable_prefix_caching",
        "vllm.outputs.RequestOutput": "num_cached_tokens outputs",
        "vllm.outputs.CompletionOutput": "cumulative_logprob token_ids",
    },
    "requests": {
        "vllm.v1.core.sched.output.SchedulerOutput": "finished_req_ids scheduled_new_reqs",
        "vllm.v1.core.sched.output.NewRequestData": "prompt_len req_id sampling_params",
        "vllm.sampling_params.SamplingParams": "extra_args",
    },
    "runner_v1": {
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner": "input_batch model",
        "vllm.v1.worker.gpu_input_batch.InputBatch": "num_computed_tokens_cpu num_reqs req_ids",
    },
    "runner_v2": {
        "vllm.v1.worker.gpu.model_runner.GPUModelRunner": "model",
        "vllm.v1.worker.gpu.input_batch.InputBatch": "num_computed_tokens_np num_scheduled_tokens req_ids",
    },
    "sites": {
        "vllm.config.VllmConfig": "additional_config compilation_config device_config model_config parallel_config "
        "scheduler_config speculative_config",
        "vllm.config.CompilationConfig": "cudagraph_mode mode",
        "vllm.config.ModelConfig": "get_hidden_size get_total_num_hidden_layers",
        "vllm.config.ParallelConfig": "prefill_context_parallel_size use_sequence_parallel_moe use_ubatching",
        "vllm.config.SchedulerConfig": "max_num_seqs",
        "vllm.config.DeviceConfig": "device",
    },
    "waiting": {"vllm.distributed.device_communicators.shm_broadcast.SpinCondition": "busy_loop_s last_read"},
    "worker": {"vllm.v1.worker.gpu_worker.Worker": "model_runner"},
}

# Modules that were moved between the versions of vLLM that we read: either place will do.
MOVED: tuple[frozenset[str], ...] = (
    # To the second in 0.33.
    frozenset({"vllm.entrypoints.launchers.cli_args", "vllm.entrypoints.common.cli_args"}),
)

# Functions that are called on an object, and the parameters that the call needs, in order from the first.
CALLED: dict[str, dict[str, str]] = {
    "client": {
        "vllm.v1.engine.async_llm.AsyncLLM.generate": "self prompt sampling_params request_id",
        "vllm.v1.engine.core_client.AsyncMPClient._call_utility_async": "self method engine",
    },
    "core": {"vllm.v1.engine.core.EngineCore.collective_rpc": "self method timeout args"},
    "offline": {"vllm.v1.engine.core_client.SyncMPClient.call_utility": "self method"},
    "frontend": {
        "vllm.v1.engine.async_llm.AsyncLLM.shutdown": "self timeout",
        "vllm.engine.arg_utils.EngineArgs.create_engine_config": "self usage_context",
    },
}

# What a patched function is called by. A function that nobody calls any more can still be patched, to no effect.
CALLERS: dict[str, dict[str, str]] = {
    "endpoints": {
        "vllm.plugins.endpoint_plugins.interface.attach_endpoint_plugins": "load_endpoint_plugins",
        "vllm.entrypoints.launchers.app.build_app": "attach_endpoint_plugins",
    },
    "install": {"vllm.model_executor.model_loader.get_model": "loader.load_model"},
    "runner_v1": {
        "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model": "self._prepare_inputs self._update_states",
    },
    "runner_v2": {"vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model": "self.prepare_inputs"},
    "waiting": {
        "vllm.distributed.device_communicators.shm_broadcast.MessageQueue.acquire_read": "self._spin_condition.wait",
        "vllm.distributed.device_communicators.shm_broadcast.MessageQueue.enqueue": "self._spin_condition.notify",
    },
}

# Every module that imports a function by its name, and so has to be patched as well.
IMPORTERS: dict[str, dict[str, str]] = {
    "prefix_key": {"generate_block_hash_extra_keys": "vllm.v1.core.block_pool vllm.v1.simple_kv_offload.manager"},
}

# Attributes that a module sets on an object whose class doesn't declare them.
ASSIGNED: dict[str, dict[str, str]] = {
    "endpoint": {
        "vllm.entrypoints.launchers.api_server.app_state": "openai_serving_models",
        "vllm.entrypoints.generate.api_router": "openai_serving_chat openai_serving_completion",
        "vllm.plugins.endpoint_plugins.interface": "endpoint_plugins",
    },
}

# Beginnings of text in a module: the names of the processes that `plugin.py` knows.
TEXTS: dict[str, dict[str, str]] = {
    "plugin": {"vllm.v1.engine.utils": "EngineCore", "vllm.v1.executor.multiproc_executor": "VllmWorker"},
}


class Difference(NamedTuple):
    """Something that polyhelm's module `seam` relies on and that vLLM doesn't have."""

    seam: str
    text: str

    def __str__(self) -> str:
        return f"{self.seam}: {self.text}"


def differences(folder: Path) -> list[Difference]:
    """What the `vllm/` in a folder lacks. FileNotFoundError if there is none."""
    sources = Sources(folder)
    if sources.tree("vllm") is None:
        raise FileNotFoundError(f"{folder} holds no vllm/")
    found = [*_own(sources), *_listed(sources)]
    return list(dict.fromkeys(found))


def installed() -> Path:
    """The folder that holds the installed vLLM, which isn't imported."""
    spec = find_spec("vllm")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("vLLM isn't installed")
    return Path(spec.origin).parents[1]


def _listed(sources: Sources) -> Iterator[Difference]:
    for seam, path, names in _entries(ATTRIBUTES):
        module, _, name = path.rpartition(".")
        module = _present(sources, module)
        if sources.find(module, name) is None:
            yield Difference(seam, f"{path} is gone")
        elif missing := sources.lacking(module, name, names):
            yield Difference(seam, f"{path} has no {', '.join(missing)}")
    for seam, path, names in _entries(CALLED):
        yield from _takes(sources, seam, *_method(path), leading=names[:1], named=names[1:])
    for seam, path, names in _entries(CALLERS):
        function = sources.function(*_method(path))
        called = [each.func for each in ast.walk(function) if isinstance(each, ast.Call)] if function else []
        calls = {ast.unparse(each) for each in called}
        if missing := [each for each in names if each not in calls]:
            yield Difference(seam, f"{path} doesn't call {', '.join(missing)}")
    for seam, name, modules in _entries(IMPORTERS):
        importers = set(_importers(sources, name))
        for module in sorted(importers ^ set(modules)):
            yield Difference(seam, f"{module} {'also imports' if module in importers else 'no longer imports'} {name}")
    for seam, module, names in _entries(ASSIGNED):
        tree = sources.tree(module)
        stored = {
            each.attr
            for each in (ast.walk(tree.node) if tree else ())
            if isinstance(each, ast.Attribute) and isinstance(each.ctx, ast.Store)
        }
        if missing := [each for each in names if each not in stored]:
            yield Difference(seam, f"{module} doesn't set {', '.join(missing)}")
    for seam, module, names in _entries(TEXTS):
        tree = sources.tree(module)
        texts = [
            each.value
            for each in (ast.walk(tree.node) if tree else ())
            if isinstance(each, ast.Constant) and isinstance(each.value, str)
        ]
        if missing := [each for each in names if not any(text.startswith(each) for text in texts)]:
            yield Difference(seam, f"{module} doesn't name {', '.join(missing)}")


def _own(sources: Sources) -> Iterator[Difference]:
    """What polyhelm's own sources import, wrap and call with keywords."""
    for file in sorted(ENGINE.rglob("*.py")):
        tree = ast.parse(file.read_text("utf-8"), str(file))
        imported = {
            alias.asname or alias.name: (_present(sources, node.module), alias.name)
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "vllm"
            for alias in node.names
        }
        for module, name in imported.values():
            if sources.find(module, name) is None:
                yield Difference(file.stem, f"{module}.{name} is gone")
        for call in ast.walk(tree):
            if isinstance(call, ast.Call):
                if isinstance(call.func, ast.Name) and call.func.id == "wrap":
                    yield from _wrapped(sources, file.stem, call, imported)
                else:
                    yield from _called(sources, file.stem, call, imported)


def _wrapped(sources: Sources, seam: str, call: ast.Call, imported: dict[str, tuple[str, str]]) -> Iterator[Difference]:
    """`wrap(owner, name, parameters, make)`, of which the first three have to be written out."""
    owner, name, leading = call.args[:3]
    assert isinstance(owner, ast.Name), f"{seam}: {ast.unparse(call)}"
    module, original = imported[owner.id]
    if sources.tree(f"{module}.{original}") is not None:
        yield from _takes(sources, seam, f"{module}.{original}", ast.literal_eval(name), ast.literal_eval(leading))
    else:
        yield from _takes(sources, seam, module, f"{original}.{ast.literal_eval(name)}", ast.literal_eval(leading))


def _called(sources: Sources, seam: str, call: ast.Call, imported: dict[str, tuple[str, str]]) -> Iterator[Difference]:
    """A call of something imported, or of a method of an imported class; checks its keywords."""
    named = [keyword.arg for keyword in call.keywords if keyword.arg]
    if isinstance(call.func, ast.Name) and call.func.id in imported:
        yield from _takes(sources, seam, *imported[call.func.id], named=named)
    elif isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        if owner := imported.get(call.func.value.id):
            found = sources.find(*owner)
            if found is not None and isinstance(found.node, ast.ClassDef):
                yield from _takes(sources, seam, owner[0], f"{owner[1]}.{call.func.attr}", named=named)


def _takes(
    sources: Sources,
    seam: str,
    module: str,
    name: str,
    leading: tuple[str, ...] | list[str] = (),
    named: list[str] | tuple[str, ...] = (),
) -> Iterator[Difference]:
    """Whether a function, or the constructor of a class, has these first parameters and these somewhere."""
    path = f"{module}.{name}"
    found = sources.find(module, name.split(".")[0])
    if found is None:
        yield Difference(seam, f"{path} is gone")
        return
    if not found.module.split(".")[0] == "vllm":
        return
    is_class = isinstance(found.node, ast.ClassDef) and "." not in name
    function = sources.function(module, f"{name}.__init__" if is_class else name)
    if function is not None:
        has = parameters(function)
    elif is_class:  # a dataclass or the like
        has = tuple(sources.fields(module, name))
    else:
        yield Difference(seam, f"{path} is gone")
        return
    if has[: len(leading)] != tuple(leading):
        yield Difference(seam, f"{path} takes ({', '.join(has)}), expected ({', '.join(leading)}, …)")
    if missing := [each for each in named if each not in has and not any(one.startswith("**") for one in has)]:
        yield Difference(seam, f"{path} takes no {', '.join(missing)}")


def _importers(sources: Sources, name: str) -> Iterator[str]:
    for file in sorted((sources.folder / "vllm").rglob("*.py")):
        if name in file.read_text("utf-8"):
            parts = file.relative_to(sources.folder).with_suffix("").parts
            module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree = sources.tree(module)
            if tree is not None and any(
                isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names)
                for node in ast.walk(tree.node)
            ):
                yield module


def _present(sources: Sources, module: str) -> str:
    """The module itself, or where this vLLM has it if it was moved."""
    places = next((each for each in MOVED if module in each), {module})
    return next((each for each in sorted(places) if sources.tree(each) is not None), module)


def _entries(table: dict[str, dict[str, str]]) -> Iterator[tuple[str, str, list[str]]]:
    for seam, entries in table.items():
        for path, names in entries.items():
            yield seam, path, names.split()


def _method(path: str) -> tuple[str, str]:
    """`module.Class.method` or `module.function`, cut behind the module."""
    parts = path.split(".")
    cut = next((index for index, part in enumerate(parts) if part[0].isupper()), len(parts) - 1)
    return ".".join(parts[:cut]), ".".join(parts[cut:])


def main(arguments: list[str]) -> int:
    if len(arguments) > 1 or arguments[:1] == ["--help"]:
        print(__doc__, file=sys.stderr)
        return 2
    try:
        found = differences(Path(arguments[0]) if arguments else installed())
    except FileNotFoundError as error:
        print(f"contract: {error}", file=sys.stderr)
        return 2
    for difference in found:
        print(difference)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
