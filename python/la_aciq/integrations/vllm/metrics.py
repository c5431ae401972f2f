"""What the server's /metrics says about languages. Labels are rows of the tables: no client can make new ones."""

from prometheus_client import Counter, Gauge

REQUESTS = Counter("la_aciq_requests", "Requests admitted, by the row of the clip tables that serves them", ["row"])
UNKNOWN = Counter("la_aciq_unknown_language_requests", "Requests in a language that has no row, served by und")
INVALID = Counter("la_aciq_invalid_language_requests", "Requests refused because their language is not BCP-47")
DETECTED = Counter("la_aciq_detected_language_requests", "Requests without a language for which one was detected")
TABLE = Gauge("la_aciq_table_info", "The clip tables that are served; always 1", ["version"])
