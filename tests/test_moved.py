"""Import paths of earlier versions: they lead to the same objects, with a warning that says where."""

import pickle
import subprocess
import sys
import warnings
from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

import ctrak_lightning
from ctrak_lightning import Sampler, _moved, methods
from ctrak_lightning.methods.objectives import Denoising
from ctrak_lightning.methods.trajectories import State
from ctrak_lightning.store import Visits

# Modules of commit 33044ca that are elsewhere now, with the public classes, functions and types that
# each had and that are still there.
OLD = """
adapters: adapter_facts attribution.asking: Built described latent_shape model_facts
refuse_differences attribution.best: Best attribution.confidence: Confidence is_noise
attribution.dots: Dots has_integer_products attribution.moments: Moments differ units
attribution.noise: beside neighbours attribution.pictures: latents_of weights_of
attribution.prompts: counter_prompt tidied attribution.query: Query assembled spec_key
attribution.questions: Given attribution.references: ImageEncoder TextEncoder as_attributions
image_similarity label_search text_search attribution.report: check_path write_report
attribution.report.columns: Columns attribution.report.figures: Bar Bars Line LineChart ShareRow
best_timeline group_timeline line_chart part_bars share_rows attribution.report.page: Card Section
check_path write_report attribution.report.pictures: Thumbnails png_uri
attribution.report.ranking: Ranking page_data ranking attribution.report.text: link shown
spec_text attribution.shares: bootstrapped_shares group_shares attribution.solve:
checkpoint_scores chosen_scores compared drawn_ensemble ensemble exposed_at exposures_at
scores_by_damping soft_thresholded spreads standardised attribution.together: Attributions
CoincidingConceptsWarning cosines_of warn_of_alike attribution.top: TopScores joint_blocks
top_scores attribution.trust: SelfCheck self_check stability attribution.words: Word near_words
occurrences words callbacks.exposures: ExposureCounter callbacks.inline: grad_scaler loss_scale
callbacks.precision: in_precision_of callbacks.samplers: Drawable batch_size_of drawable
gives_batches capture: Capture cli.outputs: add_force check_outputs cli.tracer_task: tracer_task
conditions: conditions_of specs_of content: changed_samples content_hashes escaping: csv_cell
metadata_heads visible exposures: BatchIds Exposures UntracedSampleWarning fingerprint: as_stored
model_fingerprint schedule_digest weights_digest flow: FlowSchedule frozen: Frozen
RoundedWeightsWarning Used changing_buffers is_rounded parts_of warn_of_rounding function: Fixed
UnrecordedFunctionWarning fixed_condition function_of outputs_under refuse_another_function
gradients.calls: Call anchor gradients.groups: layer_group gradients.inline: StepRecorder
gradients.layers: ConvLayer DiffusersRMSNormLayer EmbeddingLayer GroupNormLayer LayerNormLayer
LinearLayer NormLayer RMSNormLayer gradients.routes: Routes following_nodes routes
gradients.sharding: refuse_sharded gradients.undisturbed: parameters_unmoved undisturbed inline:
InlineCapture inspection: Answer Board Watch inspection.board: Board inspection.grid: Box Geometry
concept_grid inspection.hparams: HParams method_hparams write_hparams inspection.layout: Layout
layout inspection.lettering: Font drawable font one_line shortened wrapped inspection.pictures:
fitted picture squares inspection.projector: Embedding embedding principal_components
inspection.shares: ShareCurves inspection.table: described escaped ranking inspection.tags:
TagNames inspection.watch: Answer Shown Watch inversion: inverted lending: restored tensors_of
memory: Part RowLimit is_out_of_memory method: Damping Ensemble Method Normalisation methods:
ChannelProbe ConceptDirection Damping Denoising Generated InTraining Inverted Joint MeanOutput
Noised Normalisation Objective PosteriorSampling Renoised SquaredNorm Term contrast naming:
buffers_of inside modules_of parameters_of place_of plain numbering: numbered reloaded objective:
ChannelProbe ConceptDirection Denoising Joint MeanOutput Objective PosteriorSampling Prediction
Side SquaredNorm Term contrast parameterization: NoiseSchedule PredictionType Spacing processes:
DistributedProcesses Processes processes_of provenance.agreement: disagreements is_pending
missing_steps unrecorded_steps provenance.canonical: canonical digest provenance.export_card:
escape model_card provenance.export_croissant: croissant provenance.export_prov: Records prov_json
provenance.facts: checkpoint_facts commitment_facts dataset_facts forget_facts header_facts
other_facts put_commitments samples_facts stored_commitments stored_digest stored_table
provenance.query_log: LedgerWarning QueryLog result_digest provenance.recorded_store:
RecordedStore provenance.selection: ids_where positions_of read_ids rng: isolated_rng seeded_noise
running: RunningTraces schedule: Schedule scheduler_options: refuse_unfollowed selfcheck: Check
Outcome selfcheck surveying: Once Surveyed bounded require_same table_of thumbnails_of task:
Condition DiffusersTask DiffusionTask Encoded InPrecision PipelineTask Spec Wrapped encode
in_own_precision name_of named_samples resolve_task select task_modules task.assembly: accepted_by
find pipeline_class pipeline_of task.class_conditional: ClassTask ClassUNetTask task.configs:
require_config require_vae text_width task.diffusers_task: DiffusersTask task.dit: DiTTask
task.families: family_of task.flux: FluxTask task.ids: plain_id plain_ids task.pipeline_task:
Batch PipelineTask as_mapping check_usable is_trained task.pixart: PixArtTask task.precision:
InPrecision in_own_precision task.prompts: Given PromptTask task.protocol: Condition DiffusionTask
Encoded Spec encode named_samples resolve_task select task_modules task.stable_diffusion:
StableDiffusionTask task.stable_diffusion_3: StableDiffusion3Task task.stable_diffusion_xl:
StableDiffusionXLTask task.tokens: Cut given_tokens task.unconditional: UnconditionalTask
task.wrapped: Wrapped name_of unwrapped traced_model: TracedModel Weights traces:
ChangedMetadataWarning Checkpoint CheckpointWriter IncompleteStoreWarning Kernel SampleTable
StoreHeader TraceStore TraceWriter Visits traces.arrays: check_digest corrupt find_dataset
open_for_reading open_for_writing read_array read_strings write_array traces.atomic: FileRecord
fsync_folder make_folder sha256_of write_atomically traces.background: InBackground
traces.checkpoint_writer: CheckpointWriter traces.exposures: read_exposures write_exposures
traces.facts: provenance_facts traces.files: is_checkpoint_folder is_there open_file reading
refuse_linked_folder size_of traces.function: Function read_function write_function traces.kernel:
GramSums Kernel gram_of_rows kernel_of_columns read_kernel write_kernel traces.lock: Holder NoLock
WriterLock hold_folder hold_for ledger_lock traces.manifest: check_sizes is_sample_table
manifest_text parse_manifest read_manifest read_text write_manifest traces.metadata_changes:
ChangedMetadataWarning warn_of_changed_metadata traces.records: Records recorded_files
remove_unrecorded traces.rewriting: kernel_of rewrite_without traces.row_array: RowArray find_rows
row_sums write_rows traces.samples: SampleTable check_unchanged column_names count_samples
read_samples write_samples traces.schema: CheckpointRecord Manifest StoreHeader differences
edition_name is_integer traces.shards: Rows Shard open_shard stored_unit write_shard traces.store:
Checkpoint IncompleteStoreWarning TraceStore read_weights traces.stored_rows: StoredRows
traces.verification: altered_files unrecorded_files traces.visits: Visits read_visits
sorted_visits write_visits traces.writer: TraceWriter default_shard_rows tracing: FeatureParts
QueryTrace Trace check_batch joined normalised trace_batch trace_query warn_if_faint trained:
Trained UntrainedParameterWarning trained_parameters trajectory: Generated Generation InTraining
Inverted Noised Renoised Sampler State Trajectory guided_output repeated trial: Question Trial
Watched conditions_of first_samples named refuse_without_condition try_questions try_samples
"""
GONE = {
    "attribution.lending": "LentModel",
    "attribution.questions": "Questions",
    "attribution.report.benchmark_figures": "benchmark_figures",
    "attribution.showing": "html_of",
    "attribution.top": "Shortlist",
    "callbacks.hparams": "logged_hparams",
    "capture": "has_sealed",
    "method": "OBJECTIVES",
    "traces.shards": "read_column",
}


def names_by_module() -> dict[str, list[str]]:
    heads = [part.split() for part in OLD.split(":")]
    modules = [words[-1] for words in heads[:-1]]
    names = [words[:-1] for words in heads[1:-1]] + [heads[-1]]
    return dict(zip(modules, names, strict=True))


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_moved, "_warned", set())


def test_every_old_name_is_the_new_one() -> None:
    listed = names_by_module()
    assert set(_moved.PLACES) == listed.keys() | GONE.keys()
    for old, names in listed.items():
        assert names
        for name in names:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                found = getattr(import_module(f"ctrak_lightning.{old}"), name)
            places = [import_module(f"ctrak_lightning.{place}") for place in _moved.PLACES[old]]
            assert any(found is getattr(place, name, None) for place in places), (old, name)
            if isinstance(found, type):
                assert getattr(import_module(found.__module__), name) is found


def test_a_module_warns_once_and_says_where_the_name_is() -> None:
    trajectory = import_module("ctrak_lightning.trajectory")
    with pytest.warns(DeprecationWarning, match="'Sampler' is in .*methods.trajectories") as told:
        names = trajectory.Sampler, trajectory.State
    assert names == (Sampler, State)
    assert [one.filename for one in told] == [__file__]


def test_a_module_that_is_still_there_has_its_names_without_a_warning() -> None:
    from ctrak_lightning.capture import Capture  # type: ignore[attr-defined]
    from ctrak_lightning.methods import Denoising as Old  # type: ignore[attr-defined]

    assert (Capture, Old) == (ctrak_lightning.Capture, Denoising)


def test_submodules_of_old_packages() -> None:
    from ctrak_lightning.traces import store, visits  # type: ignore[import-untyped]

    assert store.__name__ == "ctrak_lightning.traces.store"
    with pytest.warns(DeprecationWarning, match="store.sections"):
        assert visits.Visits is Visits


@pytest.mark.parametrize(("module", "name"), GONE.items())
def test_what_is_gone_is_said_to_be(module: str, name: str) -> None:
    with pytest.raises(AttributeError, match=f"no attribute '{name}'.*changelog"):
        getattr(import_module(f"ctrak_lightning.{module}"), name)
    with pytest.raises(ImportError, match=name):
        exec(f"from ctrak_lightning.{module} import {name}")


def test_other_names_are_still_not_found() -> None:
    assert find_spec("ctrak_lightning.nowhere") is None
    with pytest.raises(ModuleNotFoundError, match="traces.nowhere"):
        import_module("ctrak_lightning.traces.nowhere")


@pytest.mark.parametrize(
    ("module", "value"),
    [
        ("trajectory", Sampler(steps=7)),
        ("trajectory", State(torch.zeros(1), torch.tensor(3))),
        ("objective", Denoising()),
        ("method", methods.concept_trak()),
    ],
)
def test_pickles_of_old_versions(
    module: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = f"ctrak_lightning.{module}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import_module(old)
        with monkeypatch.context() as earlier:
            earlier.setattr(type(value), "__module__", old)
            written = pickle.dumps(value)
    assert old.encode() in written
    _moved._warned.clear()
    with pytest.warns(DeprecationWarning, match=old):
        assert repr(pickle.loads(written)) == repr(value)  # noqa: S301


def test_the_finder_imports_nothing() -> None:
    code = (
        "import sys, ctrak_lightning, ctrak_lightning.traces.store\n"
        "print({'torch', 'lightning', 'numpy', 'h5py'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (printed.stdout, printed.stderr) == ("set()\n", "")
