"""From the `steering` field of a request to a program for the served model, and from counts to a receipt.

A field is parsed, its artifacts are resolved and checked against the served model, and their kind says which edits they
become (methods/kinds.py). Anything that can't be applied exactly as asked is an error with a reason.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from starlette.concurrency import run_in_threadpool

from methods.kinds import OptionError, Recipe
from server import metrics
from server.api import conflicts, options, presets
from server.api.doses import Doses
from server.api.errors import ApiError
from server.api.leases import Leases
from server.api.prepared import Loader, Prepared, Site
from server.api.receipts import Applied, AppliedEdit, Receipt
from server.api.served import ServedModel
from server.api.source_language import Prompts, SourceLanguage
from server.api.steering_schema import LAST_PROMPT_TOKEN, Condition, parse
from server.engine import edits as engine
from server.engine.edits import Edit, Point, Program, ProgramError, layers_at
from server.engine.operands import Operand, pack
from server.engine.site_names import SiteNameError, parse_site, site_name
from server.engine.spans import Span
from server.tenants import check_visible
from steering_store import ArtifactVersion, Store, parse_reference
from steering_store.errors import ArtifactNotFound, StoreError


@dataclass
class _Draft:
    """A program in the making."""

    edits: list[Edit] = field(default_factory=list)
    owners: list[int | None] = field(default_factory=list)
    operands: dict[str, Loader] = field(default_factory=dict)
    applied: list[Applied] = field(default_factory=list)
    versions: list[ArtifactVersion] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    digests: set[str] = field(default_factory=set)
    gains: dict[str, tuple[float, ...]] = field(default_factory=dict)


@dataclass
class Steerer:
    """Turns `steering` fields into programs for the served model, and counts into receipts."""

    store: Store
    model: ServedModel
    max_edits: int
    max_strength: float
    doses: Doses
    leases: Leases

    async def look_up_and_prepare(self, raw: object, prompts: Prompts | None = None) -> Prepared:
        """As `prepare`, but what isn't known here is looked for elsewhere first, while other requests go on."""
        with suppress(ArtifactNotFound):
            return self.prepare(raw, prompts)
        await run_in_threadpool(self.store.learn)
        return self.prepare(raw, prompts)

    def prepare(self, raw: object, prompts: Prompts | None = None) -> Prepared:
        """Parse, resolve and compile, of artifacts that are known here. Raises ApiError or a StoreError that names the
        field.

        `prompts` has the texts by which the language is told where a preset asks for it and the request names none.
        """
        steering = parse(raw)
        language = SourceLanguage(steering.source_language, prompts)
        self.doses.check_request(steering.max_relative_dose)
        count = len(steering.interventions)
        if count > self.max_edits:
            raise self._too_many(f"{count} interventions")
        draft = _Draft()
        for index, intervention in enumerate(steering.interventions):
            where = f"steering.interventions.{index}"
            try:
                version = self._resolve(draft, intervention.artifact, f"{where}.artifact")
                for part in presets.expand(intervention, version, language):
                    draft.numbers.append(index)
                    self._add(draft, part, where, steering.mode)
            except OptionError as error:
                raise ApiError(422, f"{where}.{error.field}: {error}", f"{where}.{error.field}") from None
        language.check_used()
        sites = self._frozen_sites(draft) if steering.mode == "frozen" else ()
        edits = len(draft.edits) + len({point for point, _ in sites})
        if edits > self.max_edits:
            raise self._too_many(f'{count} interventions make {edits} edits (conditions, renorm and mode "frozen" add)')
        program = Program(tuple(draft.edits))
        try:
            program.check()
        except ProgramError as error:
            owner = draft.owners[error.index]
            where = "steering" if owner is None else f"steering.interventions.{draft.numbers[owner]}"
            raise ApiError(422, f"{where}: {error}", where) from None
        return Prepared(
            program,
            tuple(draft.owners),
            tuple(draft.numbers),
            draft.operands,
            draft.applied,
            tuple(draft.versions),
            frozenset(draft.digests),
            steering,
            sites,
            language=language.chosen,
            gains=draft.gains,
        )

    def _too_many(self, what: str) -> ApiError:
        return ApiError(422, f"{what}: a request takes at most {self.max_edits}", "steering.interventions")

    def _add(self, draft: _Draft, part: presets.Part, where: str, mode: str) -> None:
        intervention = part.intervention
        version = self._resolve(draft, intervention.artifact, f"{where}.artifact")
        manifest = version.manifest
        intervention = options.with_default_features(intervention, manifest)
        op = options.chosen_op(intervention, manifest)
        layers = options.chosen_layers(intervention, manifest, version.ref)
        strength = options.chosen_strength(intervention, op, manifest, self.max_strength, part.scale)
        span = options.chosen_span(intervention, mode)
        pieces = options.parts(intervention, op, strength, layers, manifest, self.max_strength)
        self.model.check_point(version, [piece.opcode for piece in pieces], f"{where}.artifact")
        applied = Applied(
            preset=part.preset,
            artifact=version.name,
            version=version.version,
            digest=version.digest,
            kind=manifest.kind,
            op=op,
            sites=[site_name(manifest.point, layer) for layer in layers],
            strength=strength,
        )
        owner, gate = len(draft.applied), None
        if intervention.condition is not None:
            gate = len(draft.edits)
            condition, edit = self._gate(draft, intervention.condition, manifest.point, layers, span, where)
            applied.condition = f"{condition.name}@{condition.digest}"
            draft.edits.append(edit)
            draft.operands.setdefault(condition.digest, self._loader(condition, Recipe("vector")))
        for piece in pieces:
            key = None
            if piece.recipe is not None:
                key = piece.recipe.key(version.digest)
                draft.operands.setdefault(key, self._loader(version, piece.recipe))
                if piece.recipe.gains is not None:
                    draft.gains[key] = piece.recipe.gains
            edit = Edit(piece.opcode, key, layers, piece.strength, span, manifest.point, piece.function, gate=gate)
            draft.edits.append(edit)
        draft.owners += [owner] * (len(draft.edits) - len(draft.owners))
        draft.versions.append(version)
        draft.applied.append(applied)

    def _resolve(self, draft: _Draft, reference: str, param: str) -> ArtifactVersion:
        try:
            check_visible(parse_reference(reference).name)
            version = self.store.known(reference)
        except StoreError as error:
            error.param = param
            raise
        self.model.check_model(version, param)
        draft.digests.add(version.digest)
        return version

    def _gate(
        self, draft: _Draft, condition: Condition, point: Point, layers: tuple[int, ...], span: Span, where: str
    ) -> tuple[ArtifactVersion, Edit]:
        """The artifact and the edit of a condition; for single tokens it decides where the intervention acts."""
        version = self._resolve(draft, condition.artifact, f"{where}.condition.artifact")
        if version.manifest.kind != "steering_vector":
            raise OptionError(
                "condition.artifact", f"{version.ref} is a {version.manifest.kind}; use a steering_vector"
            )
        named = _condition_layer(condition, version)
        if condition.scope == "sequence":
            if named is None:
                raise OptionError("condition.layer", "a condition for the sequence is read at one layer; name it")
            layers, span = (named,), LAST_PROMPT_TOKEN
        elif version.manifest.point != point:
            raise OptionError(
                "condition.artifact",
                f"a condition for single tokens is read where the intervention acts, at {point}, and {version.ref} is "
                f"for {version.manifest.point}; take another, or scope sequence",
            )
        elif named is not None and layers != (named,):
            raise OptionError(
                "condition.layer",
                f"a condition for single tokens decides only at its own layer, and the intervention acts at {layers}; "
                "leave it out to decide at each of them, or take scope sequence",
            )
        if missing := sorted(set(layers) - set(version.manifest.layers)):
            raise OptionError("condition.artifact", f"{version.ref} has no vector for layers {missing}")
        self.model.check_point(version, ["gate"], f"{where}.condition.artifact")
        decision = engine.Condition(condition.readout, condition.threshold, condition.above, condition.scope)
        return version, Edit(
            "gate", version.digest, layers, span=span, point=version.manifest.point, condition=decision
        )

    def _frozen_sites(self, draft: _Draft) -> tuple[Site, ...]:
        """All layers of the points that are edited: SADI's and INCLINE's released code overwrites them all."""
        for index, version in enumerate(draft.versions):
            self.model.check_point(version, ["set"], f"steering.interventions.{draft.numbers[index]}.artifact")
        points = dict.fromkeys(version.manifest.point for version in draft.versions)
        return tuple((point, layer) for point in points for layer in layers_at(point, self.model.layers))

    def _loader(self, version: ArtifactVersion, recipe: Recipe) -> Loader:
        async def load() -> Operand:
            return await run_in_threadpool(self._load, version, recipe)

        return load

    def _load(self, version: ArtifactVersion, recipe: Recipe) -> Operand:
        """Make an operand of an artifact, whose files are verified against their digests."""
        sites = [
            site
            for site in version.manifest.sites
            if site.role in recipe.roles and (recipe.layers is None or site.layer in recipe.layers)
        ]
        whole = len(sites) == len(version.manifest.sites) and recipe.rows is None
        wanted = None if whole else {site.tensor: recipe.rows for site in sites}
        tensors = self.store.load_tensors(version, wanted)
        built = {
            layer: recipe.build(
                {site.role: tensors[site.tensor] for site in sites if site.layer == layer}, version.manifest.width
            )
            for layer in sorted({site.layer for site in sites})
        }
        return pack(built)

    async def check(self, prepared: Prepared) -> None:
        """Hold the artifacts while the request lives, and work out the doses, for the receipt.

        ApiError 400 where a dose is above the limit, or limited and unknown; ArtifactNotFound where an artifact was
        deleted since.
        """
        await self.leases.hold(prepared)
        await self.doses.check(prepared)

    async def refuse_conflicts(self, prepared: Prepared, prompt_lengths: Iterable[int]) -> None:
        """ApiError 400 where two interventions write the same direction of a site for a token of these prompts."""
        needed = {edit.operand for edit in prepared.program.edits if edit.opcode in conflicts.WRITES}
        operands = {key: await prepared.operands[key]() for key in needed if key is not None}
        found = await run_in_threadpool(
            conflicts.find, prepared.program, prepared.owners, operands, tuple(prompt_lengths)
        )
        if found is not None:
            raise ApiError(
                400,
                f"interventions {prepared.numbers[found.first]} and {prepared.numbers[found.second]} write the same "
                f"direction at {found.site}; part their "
                'layers or tokens, leave one out, or allow it with conflict "sequential"',
                "steering.conflict",
            )

    def receipt(self, prepared: Prepared, touched: Sequence[Sequence[int]], cached: Sequence[int]) -> Receipt:
        """Fill in what the op counted: `touched` [edits][layers of the edit], `cached` [edits]."""
        applied = [each.model_copy(update={"edits": []}) for each in prepared.applied]
        frozen: list[AppliedEdit] = []
        for index, (edit, owner) in enumerate(zip(prepared.program.edits, prepared.owners, strict=True)):
            (frozen if owner is None else applied[owner].edits).append(
                AppliedEdit(
                    opcode=edit.opcode,
                    sites=[site_name(edit.point, layer) for layer in edit.layers],
                    strength=edit.strength,
                    relative_dose=prepared.doses.get(edit),
                    tokens_touched=min(touched[index]),
                    tokens_from_cache=cached[index],
                )
            )
        for each in applied:
            each.sum_up()
        language = prepared.language
        receipt = Receipt(
            fingerprint=prepared.program.fingerprint,
            mode=prepared.settings.mode,
            source_language=language and language.tag,
            source_language_by=language and language.by,
            applied=applied,
            frozen=frozen,
        )
        metrics.applied(receipt)
        return receipt


def _condition_layer(condition: Condition, version: ArtifactVersion) -> int | None:
    """The layer that the condition names, if it does. OptionError where its site isn't at the artifact's point."""
    if condition.site is None:
        return condition.layer
    if condition.layer is not None:
        raise OptionError("condition.site", "takes the place of layer; leave one of them out")
    try:
        point, layer = parse_site(condition.site)
    except SiteNameError as error:
        raise OptionError("condition.site", str(error)) from None
    if point != version.manifest.point:
        raise OptionError("condition.site", f"{version.ref} is for {version.manifest.point}, not for {point}")
    return layer
