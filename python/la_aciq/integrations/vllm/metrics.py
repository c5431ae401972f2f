"""What the server's /metrics says about languages. Labels are entries of the tables: no client can make new ones."""

from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import REGISTRY, Counter, Gauge, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

REQUESTS = Counter("la_aciq_requests", "Requests admitted, by the entry of the clip tables that serves them", ["entry"])
UNKNOWN = Counter("la_aciq_unknown_language_requests", "Requests in a language without an entry, served by und")
INVALID = Counter("la_aciq_invalid_language_requests", "Requests refused because their language is not BCP-47")
DETECTED = Counter("la_aciq_detected_language_requests", "Requests without a tag whose language was detected")
TABLE = Gauge("la_aciq_table_info", "The clip tables that are served; always 1", ["version"])


class Clips(Collector):
    """What the engine reported last about the clips of each entry (`adapt.report`)."""

    by_entry: Mapping[str, Sequence[float]] = {}

    def collect(self) -> Iterator[Metric]:
        """Yield the four families of metrics, one sample for each entry."""
        families = (
            CounterMetricFamily("la_aciq_sampled_values", "Values of inputs in sampled steps", labels=["entry"]),
            CounterMetricFamily("la_aciq_clipped_values", "Sampled values beyond their clip", labels=["entry"]),
            CounterMetricFamily("la_aciq_clip_moves", "Times that clips were moved or rolled back", labels=["entry"]),
            GaugeMetricFamily("la_aciq_clip_ratio", "Mean of clips over those of the checkpoint", labels=["entry"]),
        )
        for entry, values in self.by_entry.items():
            for family, value in zip(families, values, strict=True):
                family.add_metric([entry], value)
        yield from families


CLIPS = Clips()
REGISTRY.register(CLIPS)
