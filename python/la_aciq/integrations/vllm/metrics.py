"""What the server's /metrics says about languages. Labels are rows of the tables: no client can make new ones."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

REQUESTS = Counter("la_aciq_requests", "Requests admitted, by the row of the clip tables that serves them", ["row"])
UNKNOWN = Counter("la_aciq_unknown_language_requests", "Requests in a language that has no row, served by und")
INVALID = Counter("la_aciq_invalid_language_requests", "Requests refused because their language is not BCP-47")
DETECTED = Counter("la_aciq_detected_language_requests", "Requests without a language for which one was detected")
TABLE = Gauge("la_aciq_table_info", "The clip tables that are served; always 1", ["version"])


class Clips(Collector):
    """What the engine knows of the clips of each row, as it was last asked (`adapt.report`)."""

    rows: Mapping[str, Sequence[float]] = {}

    def collect(self) -> Iterator[Metric]:
        families = (
            CounterMetricFamily("la_aciq_sampled_values", "Values of inputs in sampled steps", labels=["row"]),
            CounterMetricFamily("la_aciq_clipped_values", "Those of them beyond their clip", labels=["row"]),
            CounterMetricFamily("la_aciq_clip_moves", "Times that clips were moved or rolled back", labels=["row"]),
            GaugeMetricFamily("la_aciq_clip_ratio", "Mean of clips over those of the checkpoint", labels=["row"]),
        )
        for row, values in self.rows.items():
            for family, value in zip(families, values, strict=True):
                family.add_metric([row], value)
        yield from families


CLIPS = Clips()
REGISTRY.register(CLIPS)
