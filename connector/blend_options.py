"""What a user may set about blending: once for the engine, and for each request."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

from blend.errors import BlendError
from blend.select import DEFAULT, Needs, check_budget, selector_named
from prefixstore import verdict
from prefixstore.errors import ConfigError
from prefixstore.identity import ModelIdentity
from prefixstore.segments import MIN_SEGMENT_TOKENS

logger = logging.getLogger("vllm.prefixstore")

BUDGET = 0.15
STEP_ROWS = 2048  # of 512, launching them takes a GPU's host longer than computing them
_OF_REQUEST = ("selector", "budget", "span")


@dataclass(frozen=True, slots=True)
class BlendOptions:
    """``"blend": {...}`` of the engine's settings; a request may change the first three."""

    selector: str = DEFAULT
    budget: float = BUDGET  # share of the reused tokens' work that may be spent on them
    span: int = 1  # recompute whole runs of so many positions
    min_segment_tokens: int = MIN_SEGMENT_TOKENS
    step_rows: int = STEP_ROWS  # tokens recomputed in one engine step beside other requests
    ignore_verdict: bool = False  # blend whatever `prefixstore blend-check` found

    @classmethod
    def parse(
        cls, given: Any, num_layers: int, step_tokens: int = STEP_ROWS
    ) -> BlendOptions | None:
        """Read the engine's entry; ``step_tokens``: the most it computes in a step, for which it
        has memory. None: blending is off. Raises ConfigError."""
        if given is None or given is False:
            return None
        own = cls(step_rows=min(STEP_ROWS, step_tokens))
        return own._with({} if given is True else given, num_layers, _names(cls))

    def of_request(self, asked: Any, num_layers: int) -> BlendOptions | None:
        """These with a request's own ``blend`` entry: true, false or an object."""
        if asked is False:
            return None
        return self._with({} if asked in (None, True) else asked, num_layers, _OF_REQUEST)

    def _with(self, given: Any, num_layers: int, known: tuple[str, ...]) -> BlendOptions:
        if not isinstance(given, Mapping):
            raise ConfigError(f"blend is {given!r}", "give true, false or an object")
        unknown = sorted(set(given) - set(known))
        if unknown:
            raise ConfigError(f"blend has unknown entries {unknown}", f"known: {', '.join(known)}")
        options = replace(self, **given)
        for name, least in (
            ("span", 1),
            ("min_segment_tokens", MIN_SEGMENT_TOKENS),
            ("step_rows", 1),
        ):
            value = getattr(options, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ConfigError(f"blend.{name} is {value!r}", f"give a whole number >= {least}")
        if not isinstance(options.ignore_verdict, bool):
            raise ConfigError(
                f"blend.ignore_verdict is {options.ignore_verdict!r}", "give true or false"
            )
        if not isinstance(options.budget, int | float) or isinstance(options.budget, bool):
            raise ConfigError(f"blend.budget is {options.budget!r}", "give a share from 0 to 1")
        try:
            selector = selector_named(str(options.selector))
            check_budget(selector, options.budget, num_layers)
        except BlendError as error:
            raise ConfigError(f"blend: {error}") from error
        if selector.needs is Needs.TRUTH:
            raise ConfigError(f"blend.selector is {selector.name!r}", "it is for benchmarks only")
        return options

    def heed_verdict(
        self, given: Any, folder: str, identity: ModelIdentity, num_layers: int
    ) -> tuple[BlendOptions, str]:
        """These, or those recommended for the model where ``given`` (the engine's entry) names
        neither selector nor budget; and why the model must not be blended, "" if it may."""
        if self.ignore_verdict:
            return self, ""
        found = verdict.read(folder, identity)
        if found is None:
            logger.info(
                "prefixstore: nobody has checked whether blending suits this model: run "
                "prefixstore blend-check %s --model MODEL --texts FILES", folder,
            )  # fmt: skip
            return self, ""
        where = verdict.path_of(folder, identity)
        if not found.passed:
            return self, (
                f"prefixstore blend-check failed this model: {found.reason} ({where}; to blend "
                'all the same, set "blend": {"ignore_verdict": true})'
            )
        if isinstance(given, Mapping) and {"selector", "budget"} & set(given):
            return self, ""
        recommended = {"selector": found.selector, "budget": found.budget}
        try:
            options = self._with(recommended, num_layers, _OF_REQUEST)
        except ConfigError as error:
            logger.warning("prefixstore: what %s recommends is not used: %s", where, error)
            return self, ""
        logger.info(
            "prefixstore: blending with selector %s and budget %.2f, as %s recommends",
            options.selector, options.budget, where,
        )  # fmt: skip
        return options, ""

    @property
    def scores_with_query(self) -> bool:
        """Whether the tokens behind the last segment must be there to choose."""
        return selector_named(self.selector).needs is Needs.QUERY

    @property
    def wants_staleness(self) -> bool:
        """Whether what was measured when the texts were stored is looked at."""
        return selector_named(self.selector).uses_staleness


def step_rows(blend: BlendOptions | None, step_tokens: int, *, splits: bool) -> int:
    """Most rows that are computed in a slice, ``blend`` being the engine's options, see
    `BlendOptions.parse`; 0 if none are."""
    return min(STEP_ROWS, step_tokens) * splits if blend is None else blend.step_rows


def _names(cls: type[BlendOptions]) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))
