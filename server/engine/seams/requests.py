"""What both model runners do with the requests that the scheduler starts and ends."""

from __future__ import annotations

from typing import Any

from server.engine.capture import Capture, CaptureSpec
from server.engine.edits import site_index
from server.engine.seams import CAPTURE, RECEIPT, program_of
from server.engine.sites import Installation


def update(runner: Any, scheduler_output: Any) -> None:
    """Tell the router which requests ended and which are new.

    A preempted request is not among the ended ones, so the router's counts and gates outlive a preemption. V2's
    scheduler lists it as new again when it resumes, with its output so far as part of the prefill; here it is known.
    """
    router = runner.model.polyhelm.router
    known: set[str] = vars(runner).setdefault("polyhelm_requests", set())
    for request_id in scheduler_output.finished_req_ids:
        router.release(request_id)
        known.discard(request_id)
    for new in scheduler_output.scheduled_new_reqs:
        if new.req_id not in known and _admit(runner.model.polyhelm, new.req_id, new.sampling_params, new.prompt_len):
            known.add(new.req_id)


def _admit(installation: Installation, request_id: str, sampling_params: Any, prompt_len: int) -> bool:
    """Whether there is anything to do for the request. `prompt_len` leaves out what was generated."""
    extra = getattr(sampling_params, "extra_args", None) or {}
    program = program_of(sampling_params)
    receipt = extra[RECEIPT].decode() if RECEIPT in extra else None
    capture = None
    if CAPTURE in extra:
        spec = CaptureSpec.from_wire(extra[CAPTURE])
        sites = tuple(site_index(point, layer, installation.layers) for point, layer in spec.sites)
        capture = Capture(spec, sites, prompt_len)
    if program is None and capture is None:
        return False
    installation.router.admit(request_id, program, receipt, capture, prompt_len)
    return True
