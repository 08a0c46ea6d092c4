"""The metrics for Prometheus at /metrics."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import Response

from llamavid_jax.serving.engine import Engine
from llamavid_jax.serving.prepare import Preparer

SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters that are updated as things happen, and gauges that read the engine and the preparer."""

    def __init__(self, engine: Engine, preparer: Preparer):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)  # memory, processor time, open files
        named = {"registry": self.registry, "namespace": "llamavid"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **named)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts, visual ones among them.", **named)
        self.new_tokens = Counter("new_tokens", "Tokens of answers.", **named)
        self.first_piece = Histogram(
            "first_piece_seconds", "From the request to the first words.", buckets=SECONDS, **named
        )
        for name in ("waiting", "prefilling", "running"):
            gauge = Gauge(f"answers_{name}", f"Answers that are {name} now.", **named)
            gauge.set_function(lambda name=name: engine.counts[name])
        for name, text, value in (
            ("slots", "Answers that can run at once.", lambda: engine.slots),
            ("decode_steps", "Steps of the batch so far.", lambda: engine.steps),
            ("decode_seconds", "Seconds that these took.", lambda: engine.decoding),
            ("frames_encoded", "Frames that the vision tower has seen.", lambda: preparer.frames),
            ("feature_bytes", "Features of films in memory.", lambda: preparer.features.nbytes),
        ):
            Gauge(name, text, **named).set_function(value)

    async def route(self, _: Request) -> Response:
        return Response(generate_latest(self.registry), media_type=CONTENT_TYPE_LATEST)
