"""Which family's task serves which diffusers pipeline."""

from collections.abc import Mapping
from typing import Any, TypeVar

from ctrak_lightning.errors import TaskError, nearest, shorten
from ctrak_lightning.tasks.pipeline import FIELDS, PipelineTask

FAMILIES: dict[str, type[PipelineTask]] = {}
"""By the name of the pipeline's class."""
Family = TypeVar("Family", bound=type[PipelineTask])


def register_family(family: Family) -> Family:
    """Makes a family of pipelines known, as a decorator of its class: then
    :meth:`DiffusersTask.from_pipeline` takes its pipelines, and a ``DiffusersTask`` of attributes'
    names recognises its denoisers.

    Args:
        family: a :class:`~ctrak_lightning.PipelineTask` with ``pipelines``, and ``denoisers`` if it
            is to be recognised by them. To register a class again, as a notebook does, replaces it.

    Raises:
        TaskError: it is no PipelineTask, lacks something, or one of its pipelines is another
            family's.

    Example::

        @register_family
        class WuerstchenTask(PromptTask):
            pipelines = ("WuerstchenPriorPipeline",)
            denoisers = ("WuerstchenPrior",)
            ...
    """
    if not (isinstance(family, type) and issubclass(family, PipelineTask)):
        raise TaskError(
            f"register_family({getattr(family, '__name__', family)!r}): expected a subclass of "
            "ctrak_lightning.PipelineTask."
        )
    lacking = [
        name
        for name in dir(family)
        if getattr(getattr(family, name), "__isabstractmethod__", False)
    ]
    lacking += [] if family.pipelines else ["pipelines"]
    if lacking:
        raise TaskError(
            f"register_family({family.__name__}): it lacks {', '.join(lacking)}. HINT: `pipelines` "
            "are the classes it serves, or their names in diffusers; the methods are described at "
            "PipelineTask."
        )
    _check_attributes(family)
    for pipeline in map(_name, family.pipelines):
        owner = FAMILIES.get(pipeline, family)
        if _place(owner) != _place(family):
            raise TaskError(
                f"register_family({family.__name__}): {pipeline} is {owner.__name__}'s. Expected "
                f"`pipelines` that no family has. HINT: {family.__name__}(pipeline) makes a task "
                "of one without registering."
            )
    # What the class served when it was registered before, it need not serve any more.
    for pipeline in [name for name, owner in FAMILIES.items() if _place(owner) == _place(family)]:
        del FAMILIES[pipeline]
    FAMILIES.update(dict.fromkeys(map(_name, family.pipelines), family))
    return family


def _check_attributes(family: type[PipelineTask]) -> None:
    """Refuses a family of which an attribute is of the wrong kind, or lacks what is read of it."""
    problem = None
    for name in ("pipelines", "denoisers", "frozen_parts", "optional_parts", "fields"):
        given: Any = getattr(family, name)
        kinds = (str, type) if name == "pipelines" else (str,)
        if not isinstance(given, (tuple, list)) or not all(
            isinstance(each, kinds) and each != "" for each in given
        ):
            what = "classes, or names of diffusers'" if name == "pipelines" else "texts"
            problem = f"{name} = {shorten(given, 120)}: expected a tuple of {what}"
            hint = f"{name} = ({shorten(given)},)" if isinstance(given, kinds) else f"{name} = ()"
            break
    else:
        inherited = {name for base in family.__mro__[1:] for name in vars(base).get("fields", ())}
        lacking = [
            name
            for name in (*FIELDS, "caption", "class")
            if name in inherited and name not in family.fields
        ]
        if lacking:
            problem = f"fields = {shorten(family.fields, 120)}: it lacks {', '.join(lacking)}"
            hint = "fields = (*PipelineTask.fields, 'a column of yours')"
        elif not (isinstance(family.denoiser_part, str) and family.denoiser_part):
            problem = f"denoiser_part = {shorten(family.denoiser_part)}: expected a text"
            hint = "denoiser_part = 'unet'"
    if problem:
        raise TaskError(f"register_family({family.__name__}): {problem}. HINT: {hint}.")


def _place(family: type) -> tuple[str, str]:
    return family.__module__, family.__qualname__


def family_of(pipeline: Any) -> type[PipelineTask]:
    """The class of the task for a pipeline, or for one that it inherits from.

    Raises:
        TaskError: there is none; the message lists the known pipelines.
    """
    for base in type(pipeline).__mro__:
        if base.__name__ in FAMILIES:
            family = FAMILIES[base.__name__]
            return family.variant(getattr(pipeline, family.denoiser_part, None))
    raise TaskError(
        f"DiffusersTask.from_pipeline({type(pipeline).__name__}): expected one of "
        f"{nearest(type(pipeline).__name__, FAMILIES)}. HINT: write a PipelineTask for it and "
        "`register_family` it; or a DiffusionTask: denoiser, noise_schedule, encode(batch) and "
        "condition(spec, n)."
    )


def pipeline_class(name: str) -> type:
    """A pipeline's class by its name.

    Raises:
        TaskError: it is of no known family.
    """
    if name not in FAMILIES:
        raise TaskError(
            f"DiffusersTask(pipeline={name!r}): expected one of {nearest(name, FAMILIES)}."
        )
    for pipeline in FAMILIES[name].pipelines:
        if isinstance(pipeline, type) and pipeline.__name__ == name:
            return pipeline
    import diffusers

    found: Any = getattr(diffusers, name, None)
    if not isinstance(found, type):
        raise TaskError(
            f"DiffusersTask(pipeline={name!r}): {FAMILIES[name].__name__} names it, and diffusers "
            f"{diffusers.__version__} has no such class. HINT: of a pipeline of your own give the "
            f"class itself: pipelines = ({name},)."
        )
    return found


def pipeline_for(denoiser: Any, parts: Mapping[str, Any]) -> type:
    """The class of the pipeline that a denoiser and the other parts belong to.

    Raises:
        TaskError: that cannot be told; the message lists what can.
    """
    inner = getattr(denoiser, "_orig_mod", denoiser)  # of torch.compile
    if hasattr(inner, "get_base_model"):  # of peft.get_peft_model
        inner = inner.get_base_model()
    kind = type(inner).__name__
    families = dict.fromkeys(FAMILIES.values())
    of_kind = (family for family in families if kind in family.denoisers)
    found = [name for family in of_kind if (name := family.pipeline_for(inner, parts)) is not None]
    if len(found) == 1:
        return pipeline_class(_name(found[0]))
    if found:
        raise TaskError(
            f"DiffusersTask: the denoiser is {kind}, which {', '.join(map(_name, found))} may have. "
            f"HINT: pipeline={_name(found[0])!r}, say, names the family."
        )
    known = sorted({name for family in families for name in family.denoisers})
    raise TaskError(
        f"DiffusersTask: the denoiser is {kind}: expected one of {nearest(kind, known)}. HINT: "
        "pipeline='StableDiffusionPipeline', say, names the family; a network that Fabric, "
        "Accelerate or DDP has wrapped is given unwrapped."
    )


def _name(pipeline: str | type) -> str:
    return pipeline if isinstance(pipeline, str) else pipeline.__name__
