"""The kinds of models that an artifact may hold: how each becomes a model again, and the model its rankers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from data.schemas import InputError

if TYPE_CHECKING:
    from modules.artifact import ModelArtifact

_OF_ANY = ("max_history", "batch_size")
"""Settings that every ranker has."""


@dataclass(frozen=True)
class System:
    """How the artifact of one kind of model becomes objects again.

    Attributes:
        config_class: has `to_dict` and the class method `from_dict`; a model keeps its own as `model.config`.
        model_class: called with a config.
        make_rankers: called with an artifact, the retrieval modes, none of them for the artifact's own, and ranker
            settings; gives a Ranker per mode.
        settings: ranker settings that it takes.
        has_modes: whether it takes retrieval modes.
        has_tokenizer: whether the models work on semantic ids.
    """

    config_class: Any
    model_class: Callable[[Any], nn.Module]
    make_rankers: Callable[..., list[Any]]
    settings: tuple[str, ...] = ()
    has_modes: bool = False
    has_tokenizer: bool = False

    def check_settings(self, name: str, given: Mapping[str, Any], modes: Sequence[str] = ()) -> None:
        """Refuse ranker settings and retrieval modes that this kind of model, called by its name, does not have.

        Raises:
            InputError: naming the first.
        """
        if modes and not self.has_modes:
            raise InputError(
                f"a {name!r} model ranks in one way and has no retrieval modes, got mode {modes[0]!r}. "
                "Leave mode (--mode) out."
            )
        unknown = [setting for setting in given if setting not in self.settings]
        if unknown:
            option = unknown[0].replace("_", "-")
            raise InputError(
                f"the ranker of a {name!r} model has no {unknown[0]}; its settings: "
                f"{', '.join(self.settings) or 'none'}. Leave {unknown[0]} (--{option}) out."
            )


def system_of(name: object) -> System:
    """The kind of model of a name in SYSTEMS.

    Raises:
        InputError: if there is none.
    """
    if not isinstance(name, str) or name not in SYSTEMS:
        raise InputError(
            f"there is no system {name!r}; this library knows: {', '.join(sorted(SYSTEMS))}. Update the library."
        )
    return SYSTEMS[name]()


def _retrieval() -> System:
    from modules.model import EncoderDecoderRetrievalModel, RetrievalModelConfig

    return System(
        RetrievalModelConfig,
        EncoderDecoderRetrievalModel,
        _rankers_by_mode,
        settings=("beam_width", "max_history", "batch_size", "normalize", "cuda_graphs"),
        has_modes=True,
        has_tokenizer=True,
    )


def _sasrec() -> System:
    from modules.sequential.sasrec import SASRec, SASRecConfig

    return System(SASRecConfig, SASRec, _sequence_rankers, settings=_OF_ANY)


def _hstu() -> System:
    from modules.sequential.hstu import HSTU, HSTUConfig

    return System(HSTUConfig, HSTU, _sequence_rankers, settings=_OF_ANY)


def _popularity() -> System:
    from modules.baselines.popularity import PopularityConfig, PopularityRanker

    return System(PopularityConfig, PopularityRanker, _counted_rankers, settings=_OF_ANY)


def _random() -> System:
    from modules.baselines.random import RandomConfig, RandomRanker

    return System(RandomConfig, RandomRanker, _counted_rankers, settings=_OF_ANY)


def _item_knn() -> System:
    from modules.baselines.item_knn import ItemKNNConfig, ItemKNNRanker

    return System(ItemKNNConfig, ItemKNNRanker, _counted_rankers, settings=_OF_ANY)


def _user_knn() -> System:
    from modules.baselines.user_knn import UserKNNConfig, UserKNNRanker

    return System(UserKNNConfig, UserKNNRanker, _counted_rankers, settings=_OF_ANY)


def _rankers_by_mode(artifact: "ModelArtifact", modes: Sequence[str], **settings: Any) -> list[Any]:
    from modules.retrieval_modes import make_rankers

    model: Any = artifact.model
    own = "generative" if model.config.writes_codes else "dense"
    tokenizer = artifact.tokenizer_for("ranking")
    return [*make_rankers(model, tokenizer, artifact.items, modes=modes or [own], **settings)]


def _sequence_rankers(artifact: "ModelArtifact", _: Sequence[str], **settings: Any) -> list[Any]:
    from modules.dense.vector_ranker import SequenceRanker

    model: Any = artifact.model
    return [SequenceRanker(model, **settings)]


def _counted_rankers(artifact: "ModelArtifact", _: Sequence[str], **settings: Any) -> list[Any]:
    model: Any = artifact.model
    return [model.with_settings(**settings)]


SYSTEMS: dict[str, Callable[[], System]] = {
    "retrieval": _retrieval,
    "sasrec": _sasrec,
    "hstu": _hstu,
    "popularity": _popularity,
    "random": _random,
    "item_knn": _item_knn,
    "user_knn": _user_knn,
}
"""What config.json may name as its system; another kind of model adds its entry here, imported when it is asked for."""
