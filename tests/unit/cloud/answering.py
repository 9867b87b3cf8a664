"""AWS for unit tests: answers by operation, and what was asked. No network."""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from fleet.errors import CloudError

G5 = {
    "InstanceType": "g5.xlarge",
    "VCpuInfo": {"DefaultVCpus": 4},
    "GpuInfo": {"Gpus": [{"Name": "A10G", "Manufacturer": "NVIDIA", "Count": 1, "MemoryInfo": {"SizeInMiB": 24576}}]},
}
"""DescribeInstanceTypes' word, shortened."""
C7I = {"InstanceType": "c7i.large", "VCpuInfo": {"DefaultVCpus": 2}}


def listed(*items: Any) -> Callable[..., Any]:
    """The same items whatever is asked."""
    return lambda **_: list(items)


def refused(code: str) -> Callable[..., Any]:
    """AWS says no."""

    def answer(**_: Any) -> Any:
        raise CloudError(f"it says {code}", code=code)

    return answer


class Answering:
    """In place of `aws.client`: operation to a function of its arguments and `region`."""

    def __init__(self, **answers: Callable[..., Any]) -> None:
        self.answers = answers
        self.asked: Counter[str] = Counter()

    def __call__(self, service: str, region: str) -> "_Client":
        return _Client(self, service, region)


class _Client:
    def __init__(self, aws: Answering, service: str, region: str) -> None:
        self._aws, self._service, self._region = aws, service, region

    def call(self, operation: str, **arguments: Any) -> Any:
        self._aws.asked[operation] += 1
        return self._aws.answers[operation](region=self._region, **arguments)

    def every(self, operation: str, key: str, **arguments: Any) -> Iterator[Any]:
        assert key
        yield from self.call(operation, **arguments)
