"""Old import paths, for programs and pickles that name them: an old module takes its names from the
modules that they have moved to."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any
from warnings import warn

# Each old module with the modules of today that have its names, which are tried in turn.
_TABLE = """
adapters=model.fingerprint attribution.asking=attribution.checkpoint_model
attribution.best=attribution.search attribution.confidence=attribution.diagnostics
attribution.dots=attribution.scoring attribution.lending=attribution.checkpoint_model
attribution.moments=methods.moments attribution.noise=attribution.diagnostics
attribution.pictures=attribution.queries attribution.prompts=attribution.counter_prompt
attribution.query=attribution.queries,attribution.generation
attribution.questions=attribution.queries attribution.references=attribution.baselines
attribution.report=report attribution.report.benchmark_figures=report.figures
attribution.report.columns=report.content attribution.report.figures=report.figures
attribution.report.page=report.page
attribution.report.pictures=report.content,report.page,utilities.images
attribution.report.ranking=report.content attribution.report.text=report.content
attribution.shares=attribution.result attribution.showing=attribution.result
attribution.solve=attribution.scoring,methods.damping
attribution.together=attribution.attributions attribution.top=attribution.search
attribution.trust=attribution.diagnostics attribution.words=attribution.counter_prompt
callbacks.exposures=callbacks.steps callbacks.hparams=callbacks.monitored_run
callbacks.inline=callbacks.settings callbacks.precision=callbacks.settings
callbacks.samplers=callbacks.loaders capture=capture.capture cli.outputs=cli.printing
cli.tracer_task=cli.question conditions=model.function content=capture.identity escaping=errors
exposures=capture.exposures fingerprint=model.fingerprint flow=schedules frozen=model.frozen
function=model.function gradients.calls=gradients.hooks gradients.groups=gradients.layers
gradients.inline=gradients.step_recorder
gradients.layers=gradients.kinds.linear,gradients.kinds.convolution,gradients.kinds.norm
gradients.routes=gradients.layouts gradients.sharding=gradients.plan
gradients.undisturbed=gradients.modes inline=capture.inline inspection=panels
inspection.board=panels.board inspection.grid=panels.grid inspection.hparams=panels.tags
inspection.layout=panels.tags inspection.lettering=panels.drawing
inspection.pictures=panels.drawing,utilities.images inspection.projector=panels.projector
inspection.shares=panels.tables inspection.table=panels.tables inspection.tags=panels.tags
inspection.watch=panels.watch inversion=methods.trajectories lending=model.weights
memory=utilities.memory method=methods.method,methods.damping,methods.ensembles
methods=methods.objectives,methods.trajectories,methods.method,methods.damping,methods.ensembles
naming=utilities.naming numbering=capture.identity objective=methods.objectives
parameterization=schedules processes=utilities.processes provenance.agreement=provenance.run_facts
provenance.canonical=provenance.ledger provenance.export_card=provenance.summary
provenance.export_croissant=provenance.exports provenance.export_prov=provenance.exports
provenance.facts=provenance.run_facts provenance.query_log=provenance.recording
provenance.recorded_store=provenance.recording provenance.selection=provenance.forgetting
rng=utilities.rng running=capture.running_means schedule=schedules scheduler_options=schedules
selfcheck=capture.reference_check surveying=capture.survey task=tasks
task.assembly=tasks.diffusers_task,tasks.registry
task.class_conditional=tasks.classes,tasks.families.unet2d task.configs=tasks.pipeline
task.diffusers_task=tasks.diffusers_task task.dit=tasks.families.dit task.families=tasks.registry
task.flux=tasks.families.flux task.ids=tasks.base task.pipeline_task=tasks.pipeline
task.pixart=tasks.families.pixart task.precision=tasks.precision task.prompts=tasks.text
task.protocol=tasks.base task.stable_diffusion=tasks.families.stable_diffusion
task.stable_diffusion_3=tasks.families.stable_diffusion_3
task.stable_diffusion_xl=tasks.families.stable_diffusion_xl task.tokens=tasks.text
task.unconditional=tasks.families.unet2d task.wrapped=tasks.base traced_model=model.traced_model
traces=store traces.arrays=store.arrays traces.atomic=store.files
traces.background=store.background traces.checkpoint_writer=store.checkpoint_writer
traces.exposures=store.sections traces.facts=store.facts traces.files=store.files
traces.function=store.sections traces.kernel=store.kernel traces.lock=store.lock
traces.manifest=store.manifest traces.metadata_changes=store.samples traces.records=store.records
traces.rewriting=store.integrity traces.row_array=store.arrays traces.samples=store.samples
traces.schema=store.schema,store.formats traces.shards=store.shards,store.formats
traces.store=store.store traces.stored_rows=store.stored_rows traces.verification=store.integrity
traces.visits=store.sections traces.writer=store.writer tracing=capture.trace
trained=model.weights trajectory=methods.trajectories trial=capture.trial
"""
PLACES = {old: new.split(",") for old, new in (one.split("=") for one in _TABLE.split())}
_ROOT = __package__
_warned: set[str] = set()


def names_of(module: str, *, is_gone: bool = False) -> Callable[[str], Any]:
    """The ``__getattr__`` of a module: names that have moved, as they are in their new place. Of a
    module that is still there they are taken without a warning, for parsers of YAML files look
    through a class's parents for its shortest path.

    Warns:
        DeprecationWarning: a name is taken from a module that is gone, for the first time.
    """
    old = module.removeprefix(f"{_ROOT}.")

    def taken(name: str) -> Any:
        places = [f"{_ROOT}.{place}" for place in PLACES[old]]
        # Python asks every module for special names, and finds submodules by importing them.
        is_other = (name.startswith("__") and name != "__all__") or f"{old}.{name}" in PLACES
        for place in [] if is_other else places:
            found = getattr(import_module(place), name, None)
            if found is not None and not isinstance(found, ModuleType):
                if is_gone and old not in _warned:
                    warn(
                        f"{module} has moved: its {name!r} is in {place}.",
                        DeprecationWarning,
                        stacklevel=2,
                    )
                    _warned.add(old)
                return found
        raise AttributeError(
            f"module {module!r} has no attribute {name!r}, and neither has what came in its place: "
            f"{', '.join(places)}. What was renamed or removed is in the changelog."
        )

    return taken


class MovedModules(MetaPathFinder, Loader):
    """Finds old modules, where nothing else has the name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root, _, old = fullname.partition(".")
        if root != _ROOT or old not in PLACES:
            return None
        is_package = any(one.startswith(f"{old}.") for one in PLACES)
        return spec_from_loader(fullname, self, is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__getattr__"] = names_of(module.__name__, is_gone=True)


def install() -> None:
    """Has Python look here for modules of this package that it finds nowhere else."""
    if not any(isinstance(one, MovedModules) for one in sys.meta_path):
        sys.meta_path.append(MovedModules())
