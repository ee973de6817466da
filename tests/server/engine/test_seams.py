"""What the seams do with vLLM's classes, on stand-ins: no engine."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._inductor import cpp_builder
from torch._inductor.exc import InvalidCxxCompiler

from server.engine import plugin
from server.engine.edits import Edit, Program
from server.engine.routing import BatchView
from server.engine.seams import PROGRAM, SeamError, endpoints, engine_config, install, requests, runner_v2, wrap

ROOT = Path(__file__).parents[3]
STEERED = {PROGRAM: Program((Edit("add", "v", (0,), 1.0),)).wire}


class Router:
    """Writes down what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def admit(self, request_id: str, program: Any, receipt: Any, capture: Any, prompt_len: int) -> None:
        self.told.append(("admit", request_id, prompt_len))

    def release(self, request_id: str) -> None:
        self.told.append(("release", request_id))

    def route(self, view: BatchView) -> None:
        self.told.append(("route", *view))

    def clear(self) -> None:
        self.told.append(("clear",))


def runner(router: Router) -> Any:
    return SimpleNamespace(model=SimpleNamespace(polyhelm=SimpleNamespace(router=router)))


def step(*new: Any, finished: tuple[str, ...] = (), preempted: tuple[str, ...] = ()) -> Any:
    return SimpleNamespace(scheduled_new_reqs=list(new), finished_req_ids=set(finished), preempted_req_ids=preempted)


def new(request_id: str, extra: dict[str, bytes] | None, prompt_len: int = 5) -> Any:
    return SimpleNamespace(req_id=request_id, sampling_params=SimpleNamespace(extra_args=extra), prompt_len=prompt_len)


def test_blocks_that_cannot_be_tagged_are_no_reason_not_to_start() -> None:
    """The start-up probe sees it, and keeps programs apart by salt. In a process of its own: vLLM stays patched."""
    code = """
from vllm.v1.core import kv_cache_utils
from vllm.v1.engine.core import EngineCore
def changed(request, everything): ...
kv_cache_utils.generate_block_hash_extra_keys = changed
from server.engine import seams
seams.log = type("Log", (), {"warning": lambda self, event, **fields: print(event, fields["reason"])})()
seams.patch()
print(kv_cache_utils.generate_block_hash_extra_keys is changed, hasattr(EngineCore, "polyhelm_reserve"))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()
    assert any("can't be tagged" in line and "generate_block_hash_extra_keys takes" in line for line in said), said
    assert said[-1] == "True True"


def test_a_resumed_request_is_not_admitted_again() -> None:
    router = Router()
    each = runner(router)
    requests.update(each, step(new("a", STEERED), new("plain", None)))
    requests.update(each, step(preempted=("a",)))
    requests.update(each, step(new("a", STEERED)))
    assert router.told == [("admit", "a", 5)]


def test_an_identifier_may_come_again_once_its_request_has_ended() -> None:
    router = Router()
    each = runner(router)
    requests.update(each, step(new("a", STEERED)))
    requests.update(each, step(new("a", STEERED, 7), finished=("a",)))
    assert router.told == [("admit", "a", 5), ("release", "a"), ("admit", "a", 7)]


def test_two_runners_know_their_own_requests() -> None:
    routers = Router(), Router()
    for router in routers:
        requests.update(runner(router), step(new("a", STEERED)))
    assert [router.told for router in routers] == [[("admit", "a", 5)]] * 2


@pytest.fixture
def v2(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A class in the place of vLLM's V2 runner, patched."""

    class GPUModelRunner:
        def execute_model(
            self, scheduler_output: Any, intermediate_tensors: Any = None, dummy_run: bool = False
        ) -> str:
            if not dummy_run:
                self.prepare_inputs(scheduler_output, None, None)  # type: ignore[attr-defined]
            return "done"

        def prepare_inputs(self, scheduler_output: Any, batch_req_state: Any, batch_desc: Any) -> Any:
            import numpy as np

            return SimpleNamespace(
                req_ids=["b", "a"], num_scheduled_tokens=np.array([1, 3]), num_computed_tokens_np=np.array([9, 0])
            )

    module = ModuleType("vllm.v1.worker.gpu.model_runner")
    module.GPUModelRunner = GPUModelRunner  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    runner_v2.patch()
    return GPUModelRunner


def v2_runner(cls: Any, router: Router) -> Any:
    each = cls()
    each.model = SimpleNamespace(polyhelm=SimpleNamespace(router=router))
    return each


def test_v2_routes_real_batches_in_row_order(v2: Any) -> None:
    router = Router()
    assert v2_runner(v2, router).execute_model(step(new("a", STEERED))) == "done"
    assert router.told == [("admit", "a", 5), ("route", ["b", "a"], [1, 3], [9, 0])]


@pytest.mark.parametrize("arguments", [{"dummy_run": True}, {"intermediate_tensors": None, "dummy_run": True}])
def test_v2_never_routes_a_dummy_batch(v2: Any, arguments: dict[str, Any]) -> None:
    router = Router()
    assert v2_runner(v2, router).execute_model(step(new("a", STEERED)), **arguments) == "done"
    assert v2_runner(v2, router).execute_model(step(new("a", STEERED)), None, True) == "done"
    assert router.told == [("clear",), ("clear",)]


def test_wrap_replaces_once() -> None:
    class Owner:
        def method(self, a: int, b: int = 1) -> int:
            return a + b

    for _ in range(2):
        wrap(Owner, "method", ("self", "a"), lambda original: lambda self, a: 10 * original(self, a))
    assert Owner().method(2) == 30


def test_wrap_refuses_what_is_gone_or_other() -> None:
    class Owner:
        def method(self, b: int) -> int:
            return b

    with pytest.raises(SeamError, match="Owner.nothing is gone"):
        wrap(Owner, "nothing", ("self",), lambda original: original)
    with pytest.raises(SeamError, match=r"Owner.method takes \('self', 'b'\), expected \('self', 'a'\)"):
        wrap(Owner, "method", ("self", "a"), lambda original: original)


def test_stock_engines_get_polyhelms_section_and_keep_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.engine.arg_utils import EngineArgs

    monkeypatch.setattr(EngineArgs, "create_engine_config", lambda self, usage_context=None: self.additional_config)
    engine_config.patch()
    config = EngineArgs.create_engine_config
    filled: Any = config(SimpleNamespace(additional_config={}))  # type: ignore[arg-type]
    assert filled["polyhelm"]["max_edits"] == engine_config.MAX_EDITS
    stated = {"other": 1, "polyhelm": {"max_edits": 3}}
    given: Any = config(SimpleNamespace(additional_config=stated))  # type: ignore[arg-type]
    assert given == {"other": 1, "polyhelm": {**filled["polyhelm"], "max_edits": 3}}


@pytest.mark.parametrize(
    ("tasks", "loaded", "expected"),
    [
        (("generate",), [], ["polyhelm"]),
        (("generate",), ["other"], ["other", "polyhelm"]),
        (("generate",), ["other", "polyhelm"], ["other", "polyhelm"]),
        (("render",), [], []),
        (None, [], []),
    ],
)
def test_a_patched_engine_is_never_served_without_the_endpoint(
    monkeypatch: pytest.MonkeyPatch, tasks: Any, loaded: list[str], expected: list[str]
) -> None:
    from vllm import plugins

    found = [SimpleNamespace(name=name) for name in loaded]
    monkeypatch.setattr(endpoints, "entry_points", lambda group: [*found, SimpleNamespace(name="polyhelm")])
    monkeypatch.setattr(plugins, "load_endpoint_plugins", lambda supported_tasks=None: list(found))
    endpoints.patch()
    assert [each.name for each in plugins.load_endpoint_plugins(tasks)] == expected


@pytest.mark.parametrize(
    ("enabled", "name", "dies"),
    [
        ("1", "EngineCore", True),
        ("1", "EngineCore_DP3", True),
        ("1", "VllmWorker-0", True),
        ("1", "Process-1", False),
        ("1", "ApiServer_0", True),
        ("0", "EngineCore", False),
    ],
)
def test_only_serving_processes_die_with_their_parent(
    monkeypatch: pytest.MonkeyPatch, enabled: str, name: str, dies: bool
) -> None:
    tied: list[Any] = []
    monkeypatch.setenv(plugin.ENABLED, enabled)
    monkeypatch.setattr("server.engine.seams.patch", lambda: None)
    monkeypatch.setattr(multiprocessing, "parent_process", lambda: "parent")
    monkeypatch.setattr(multiprocessing, "current_process", lambda: SimpleNamespace(name=name))
    monkeypatch.setattr(plugin, "die_with", tied.append)
    monkeypatch.setattr(sys, "platform", "linux")
    plugin.register()
    assert tied == (["parent"] if dies else [])


def test_a_front_end_that_would_ignore_steering_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(SeamError, match="unset VLLM_USE_RUST_FRONTEND"):
        endpoints.patch()


@pytest.mark.parametrize("found", [True, False])
def test_helpers_run_uncompiled_only_without_a_compiler(monkeypatch: pytest.MonkeyPatch, found: bool) -> None:
    stances: list[str] = []

    def get_cpp_compiler() -> str:
        if not found:
            raise InvalidCxxCompiler
        return "g++"

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", get_cpp_compiler)
    monkeypatch.setattr(torch.compiler, "set_stance", stances.append)
    install.do_without_compiler()
    assert stances == ([] if found else ["force_eager"])
