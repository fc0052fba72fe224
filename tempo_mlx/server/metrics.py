"""The Prometheus metrics of GET /metrics. One registry per server, nothing global."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from tempo_mlx.server.protocol import Beat

STEP_BUCKETS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SECONDS_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
WIDTH_BUCKETS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 32)


class Metrics:
    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.requests = Counter("tempo_requests", "Requests that ended.", ["kind", "outcome"], registry=r)
        self.refused = Counter(
            "tempo_requests_refused", "Requests refused because the queue was full.", registry=r
        )
        self.responses = Counter("tempo_http_responses", "Responses.", ["route", "status"], registry=r)
        self.request_seconds = Histogram(
            "tempo_request_seconds",
            "Time from arrival to end.",
            ["kind"],
            buckets=SECONDS_BUCKETS,
            registry=r,
        )
        self.queue_seconds = Histogram(
            "tempo_queue_seconds", "Time spent waiting.", buckets=SECONDS_BUCKETS, registry=r
        )
        self.running = Gauge("tempo_requests_running", "Requests being decoded.", registry=r)
        self.waiting = Gauge("tempo_requests_waiting", "Requests in the queue.", registry=r)
        self.steps = Counter("tempo_steps", "Logical decoding steps.", registry=r)
        self.rows = Counter("tempo_rows", "Rows (members of sets) chosen.", registry=r)
        self.width = Histogram("tempo_set_width", "Members of a set.", buckets=WIDTH_BUCKETS, registry=r)
        self.together = Histogram(
            "tempo_step_requests",
            "Requests that shared the forward pass of a step.",
            buckets=WIDTH_BUCKETS,
            registry=r,
        )
        self.step_seconds = Histogram(
            "tempo_step_seconds", "Time of a step.", buckets=STEP_BUCKETS, registry=r
        )
        self.prefill_seconds = Histogram(
            "tempo_prefill_seconds", "Time of running a prompt.", buckets=SECONDS_BUCKETS, registry=r
        )
        self.cache_slots = Gauge("tempo_cache_slots", "Cache slots in use, sessions included.", registry=r)
        self.sessions = Gauge("tempo_sessions", "Sessions kept.", registry=r)
        self.memory = Gauge("tempo_worker_memory_bytes", "Resident memory of the worker.", registry=r)
        self.worker_restarts = Counter("tempo_worker_restarts", "Times the worker died.", registry=r)

    def step(self, stats: dict[str, float]) -> None:
        """Statistics of one decoding step, and of the prefill before the first."""
        self.steps.inc()
        self.rows.inc(stats["width"])
        self.width.observe(stats["width"])
        self.together.observe(stats["together"])
        if "prefill_seconds" in stats:
            self.prefill_seconds.observe(stats["prefill_seconds"])
        else:
            self.step_seconds.observe(stats["step_seconds"])

    def measure(self, running: int, waiting: int, beats: Sequence[Beat]) -> None:
        """What there is now, of all models together."""
        self.running.set(running)
        self.waiting.set(waiting)
        self.memory.set(sum(beat.memory_bytes for beat in beats))
        self.sessions.set(sum(beat.sessions for beat in beats))
        self.cache_slots.set(sum(beat.cache_slots for beat in beats))

    def text(self) -> bytes:
        return generate_latest(self.registry)
