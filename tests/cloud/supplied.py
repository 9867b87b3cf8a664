"""What moto lacks: prices, spot prices, EC2's quotas, and the Deep Learning AMIs' parameters."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from moto.ec2.models.instance_types import INSTANCE_TYPE_OFFERINGS, INSTANCE_TYPES

from tests.cloud import account, wire
from tests.cloud.wire import Call, Reply

ON_DEMAND = {
    "g4dn.xlarge": 0.526, "g4dn.2xlarge": 0.752, "g4dn.12xlarge": 3.912,
    "g5.xlarge": 1.006, "g5.2xlarge": 1.212, "g5.4xlarge": 1.624, "g5.12xlarge": 5.672, "g5.48xlarge": 16.288,
    "g6.xlarge": 0.8048, "g6.2xlarge": 0.9776, "g6.12xlarge": 4.6016, "g6e.xlarge": 1.861,
    "p4d.24xlarge": 21.9576, "p5.48xlarge": 55.04,
    "c7i.large": 0.08925, "c7i.xlarge": 0.1785, "c7i.2xlarge": 0.357, "c7g.large": 0.0725, "c7g.xlarge": 0.145,
    "m7i.large": 0.1008, "m7i.xlarge": 0.2016, "m7g.large": 0.0816,
}  # fmt: skip
"""US dollars an hour in us-east-1, Linux, shared tenancy; other regions are dearer by `DEARER`."""
DEARER = {"us-east-1": 1.0, "us-east-2": 1.0, "us-west-2": 1.0, "eu-west-1": 1.1, "eu-central-1": 1.25}
SPOT = 0.35
"""Of the price on demand, in zone a; each further zone is 4 % dearer."""
_LOCATIONS = {
    "us-east-1": "US East (N. Virginia)", "us-east-2": "US East (Ohio)", "us-west-2": "US West (Oregon)",
    "eu-west-1": "EU (Ireland)", "eu-central-1": "EU (Frankfurt)",
}  # fmt: skip
QUOTAS = {
    ("standard", "on-demand"): ("L-1216C47A", "Running On-Demand Standard (A, C, D, H, I, M, R, T, Z) instances"),
    ("standard", "spot"): ("L-34B43A08", "All Standard (A, C, D, H, I, M, R, T, Z) Spot Instance Requests"),
    ("g", "on-demand"): ("L-DB2E81BA", "Running On-Demand G and VT instances"),
    ("g", "spot"): ("L-3819A6DF", "All G and VT Spot Instance Requests"),
    ("p", "on-demand"): ("L-417A185B", "Running On-Demand P instances"),
    ("p", "spot"): ("L-7212CCBC", "All P4, P3 and P2 Spot Instance Requests"),
    ("p5", "spot"): ("L-C4BD4855", "All P5 Spot Instance Requests"),
}
PLENTY = 100_000.0
_IMAGES = {f"{driver}-{system}" for driver in ("base-oss-nvidia-driver-gpu", "base-with-single-cuda")
           for system in ("ubuntu-22.04", "ubuntu-24.04", "amazon-linux-2023")}  # fmt: skip
_PARAMETER = re.compile(r"/aws/service/deeplearning/ami/(x86_64|arm64)/([a-z0-9.-]+)/latest/ami-id$")


def price(region: str, instance_type: str) -> float | None:
    """US dollars an hour on demand."""
    usual = ON_DEMAND.get(instance_type)
    return None if usual is None else round(usual * DEARER.get(region, 1.3), 6)


def spot_price(zone: str, instance_type: str) -> float | None:
    """US dollars an hour of a spot instance in a zone."""
    usual = price(zone[:-1], instance_type)
    return None if usual is None else round(usual * SPOT * (1 + 0.04 * (ord(zone[-1]) - ord("a"))), 6)


def family(instance_type: str, market: str) -> str:
    """Which quota counts it."""
    letters = re.match(r"[a-z]+", instance_type)
    assert letters is not None
    if letters[0] in {"g", "gr", "vt"} or instance_type.startswith("g"):
        return "g"
    if letters[0] == "p":
        return "p5" if market == "spot" and instance_type.startswith("p5") else "p"
    return "standard"


def vcpus(instance_type: str) -> int:
    """Of one instance."""
    return int(INSTANCE_TYPES[instance_type]["VCpuInfo"]["DefaultVCpus"])


@dataclass
class Supplied:
    """Answers to calls that moto cannot answer."""

    limits: dict[tuple[str, str, str], float] = field(default_factory=dict)
    """Region, family and market to vCPUs: enforced; all others are plenty."""

    def answer(self, call: Call) -> Reply | None:
        """The answer, if the call is one of those."""
        if call.service == "pricing":
            return _products(call) if call.action == "GetProducts" else None
        if call.service in {"service-quotas", "servicequotas"}:
            return self._quotas(call)
        if call.service == "ec2" and call.action == "DescribeSpotPriceHistory":
            return _spot_history(call)
        if call.service == "ssm" and "/aws/service/deeplearning/" in json.dumps(call.data):
            return _parameters(call)
        return None

    def _quotas(self, call: Call) -> Reply | None:
        if call.data.get("ServiceCode") != "ec2":
            return None
        quotas = [
            {
                "ServiceCode": "ec2", "ServiceName": "Amazon Elastic Compute Cloud (Amazon EC2)",
                "QuotaArn": f"arn:aws:servicequotas:{call.region}:123456789012:ec2/{code}",
                "QuotaCode": code, "QuotaName": name, "Unit": "None", "Adjustable": True, "GlobalQuota": False,
                "Value": self.limits.get((call.region, *key), PLENTY),
            }
            for key, (code, name) in QUOTAS.items()
        ]  # fmt: skip
        if call.action == "ListServiceQuotas":
            return wire.as_json(_page("Quotas", quotas, call.data))
        wanted = [quota for quota in quotas if quota["QuotaCode"] == call.data.get("QuotaCode")]
        if not wanted:
            return wire.error(call, "NoSuchResourceException", "The quota does not exist.")
        return wire.as_json({"Quota": wanted[0]})

    def over(self, region: str, instance_type: str, market: str, count: int) -> bool:
        """Whether so many more would be over a limit that was set."""
        counted = family(instance_type, market)
        limit = self.limits.get((region, counted, market))
        if limit is None:
            return False
        used = sum(
            vcpus(one.instance_type)
            for one in account.instances(region)
            if one.state in {"pending", "running"}
            and ("spot" if one.lifecycle == "spot" else "on-demand") == market
            and family(one.instance_type, market) == counted
        )
        return used + count * vcpus(instance_type) > limit


def _page(key: str, items: list[Any], data: dict[str, Any], usual: int = 100) -> dict[str, Any]:
    start, size = int(data.get("NextToken") or 0), int(data.get("MaxResults") or usual)
    page: dict[str, Any] = {key: items[start : start + size]}
    if start + size < len(items):
        page["NextToken"] = str(start + size)
    return page


def _products(call: Call) -> Reply:
    if call.data.get("ServiceCode") != "AmazonEC2":
        return wire.error(call, "InvalidParameterException", "only AmazonEC2 is known here")
    filters = [(item["Type"], item["Field"], item["Value"]) for item in call.data.get("Filters", ())]
    if unknown := [kind for kind, _, _ in filters if kind not in {"TERM_MATCH", "EQUALS", "ANY_OF"}]:
        return wire.error(call, "InvalidParameterException", f"no such filter: {unknown[0]}")
    found = [
        json.dumps(item)
        for item in _offers()
        if all(
            str(item["product"]["attributes"].get(name, "")) in (value.split(",") if kind == "ANY_OF" else [value])
            for kind, name, value in filters
        )
    ]
    return wire.as_json({"FormatVersion": "aws_v1", **_page("PriceList", found, call.data)})


def _offers() -> Iterator[dict[str, Any]]:
    """Each type as sold on Linux, and beside it what a filter must leave out."""
    variants = (
        ("Linux", "Shared", "Used", "NA", 1.0),
        ("Windows", "Shared", "Used", "NA", 1.9),
        ("Linux", "Dedicated", "Used", "NA", 1.1),
        ("Linux", "Shared", "UnusedCapacityReservation", "NA", 1.0),
        ("Linux", "Shared", "AllocatedCapacityReservation", "NA", 0.0),
        ("Linux", "Shared", "Used", "SQL Std", 3.0),
    )
    for region, location in _LOCATIONS.items():
        for instance_type in ON_DEMAND:
            for number, (system, tenancy, status, software, factor) in enumerate(variants):
                usual = price(region, instance_type)
                assert usual is not None
                sku = f"{instance_type}{region}{number}".upper().replace(".", "").replace("-", "")
                attributes = {
                    "servicecode": "AmazonEC2", "servicename": "Amazon Elastic Compute Cloud",
                    "instanceType": instance_type, "instanceFamily": "GPU instance", "vcpu": str(vcpus(instance_type)),
                    "location": location, "locationType": "AWS Region", "regionCode": region,
                    "operatingSystem": system, "tenancy": tenancy, "capacitystatus": status,
                    "preInstalledSw": software, "licenseModel": "No License required", "marketoption": "OnDemand",
                    "operation": "RunInstances", "currentGeneration": "Yes",
                }  # fmt: skip
                yield {
                    "product": {"productFamily": "Compute Instance", "sku": sku, "attributes": attributes},
                    "serviceCode": "AmazonEC2",
                    "terms": _terms(sku, usual * factor),
                    "version": "20251121000000",
                    "publicationDate": "2025-11-21T00:00:00Z",
                }


def _terms(sku: str, usd: float) -> dict[str, Any]:
    term, rate = f"{sku}.JRTCTXETXF", f"{sku}.JRTCTXETXF.6YS6EN2CT7"
    dimension = {
        "rateCode": rate, "unit": "Hrs", "beginRange": "0", "endRange": "Inf", "appliesTo": [],
        "description": f"${usd:.6f} per hour", "pricePerUnit": {"USD": f"{usd:.10f}"},
    }  # fmt: skip
    offer = {
        "sku": sku, "offerTermCode": "JRTCTXETXF", "effectiveDate": "2025-11-01T00:00:00Z",
        "termAttributes": {}, "priceDimensions": {rate: dimension},
    }  # fmt: skip
    return {"OnDemand": {term: offer}}


def _spot_history(call: Call) -> Reply:
    filters = call.filters()
    types = call.listed("InstanceType") or filters.get("instance-type") or list(ON_DEMAND)
    systems = call.listed("ProductDescription") or filters.get("product-description") or ["Linux/UNIX"]
    zones = [call.parameters["AvailabilityZone"]] if "AvailabilityZone" in call.parameters else []
    zones = zones or filters.get("availability-zone", [])
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    offered = INSTANCE_TYPE_OFFERINGS["availability-zone"].get(call.region, [])
    items = []
    for offer in offered:
        zone, instance_type = offer["Location"], offer["InstanceType"]
        usd = spot_price(zone, instance_type)
        if usd is None or instance_type not in types or (zones and zone not in zones):
            continue
        items += [
            f"<item><instanceType>{instance_type}</instanceType><productDescription>{system}</productDescription>"
            f"<spotPrice>{usd:.6f}</spotPrice><timestamp>{now}</timestamp>"
            f"<availabilityZone>{zone}</availabilityZone></item>"
            for system in systems
        ]
    page = _page("items", items, call.parameters, usual=1000)
    inner = f"<spotPriceHistorySet>{''.join(page['items'])}</spotPriceHistorySet>"
    return wire.ec2_answer(call.action, f"{inner}<nextToken>{page.get('NextToken', '')}</nextToken>")


def _parameters(call: Call) -> Reply | None:
    if call.action == "GetParameter":
        found = _parameter(call.region, call.data["Name"])
        if found is None:
            return wire.error(call, "ParameterNotFound", f"Parameter {call.data['Name']} not found.")
        return wire.as_json({"Parameter": found})
    if call.action == "GetParameters":
        answers = {name: _parameter(call.region, name) for name in call.data["Names"]}
        return wire.as_json(
            {
                "Parameters": [found for found in answers.values() if found],
                "InvalidParameters": [name for name, found in answers.items() if not found],
            }
        )
    if call.action == "GetParametersByPath":
        names = [f"/aws/service/deeplearning/ami/{cpu}/{name}/latest/ami-id" for cpu in ("x86_64", "arm64")
                 for name in sorted(_IMAGES)]  # fmt: skip
        inside = [_parameter(call.region, name) for name in names if name.startswith(call.data["Path"])]
        return wire.as_json(_page("Parameters", inside, call.data, usual=10))
    return None


def _parameter(region: str, name: str) -> dict[str, Any] | None:
    match = _PARAMETER.match(name)
    if match is None or match[2] not in _IMAGES:
        return None
    image = account.deep_learning_image(region, match[2], match[1])
    return {
        "Name": name, "Type": "String", "Value": image, "Version": 1, "DataType": "text",
        "LastModifiedDate": datetime(2025, 11, 21, tzinfo=UTC).timestamp(),
        "ARN": f"arn:aws:ssm:{region}::parameter{name}",
    }  # fmt: skip
