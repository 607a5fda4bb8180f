"""What is in deploy/: references lead somewhere, commands are real, probes are routes, and there is time to stop."""

import re
from pathlib import Path

import pytest
import yaml
from starlette.routing import Route

from ropewalk.cli import parse
from ropewalk.server.app import ROUTES
from ropewalk.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
OBJECTS = [
    found
    for path in sorted((DEPLOY / "kubernetes").glob("*.yaml"))
    for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))
]
KINDS = {"ServiceAccount": "v1", "PersistentVolumeClaim": "v1", "Service": "v1", "Deployment": "apps/v1"}
KINDS |= {"NetworkPolicy": "networking.k8s.io/v1"}
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def one(kind):
    [found] = [each for each in OBJECTS if each["kind"] == kind]
    return found


@pytest.fixture
def pod():
    return one("Deployment")["spec"]["template"]["spec"]


@pytest.fixture
def container(pod):
    [found] = pod["containers"]
    return found


def stops_in(command):
    """Seconds that a server of this command may take to stop: its notice, its drain, and a training's checkpoint."""
    asked = parse(command)
    return asked.drain_notice_seconds + asked.drain_seconds + ServerSettings().job_grace_seconds


def test_every_object_is_of_a_known_kind_and_has_a_name_of_its_own():
    assert {each["kind"]: each["apiVersion"] for each in OBJECTS} == KINDS
    assert all(re.fullmatch(r"[a-z0-9-]{1,63}", each["metadata"]["name"]) for each in OBJECTS)
    assert len({(each["kind"], each["metadata"]["name"]) for each in OBJECTS}) == len(OBJECTS)


def test_selectors_ports_volumes_and_accounts_lead_somewhere(pod, container):
    deployment, service = one("Deployment")["spec"], one("Service")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert deployment["selector"]["matchLabels"].items() <= labels.items()
    assert service["selector"].items() <= labels.items()
    assert one("NetworkPolicy")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    ports = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["ports"]} <= ports
    assert {probe["httpGet"]["port"] for probe in (container["readinessProbe"], container["livenessProbe"])} <= ports
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    claims = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert claims == {one("PersistentVolumeClaim")["metadata"]["name"]}
    assert pod["serviceAccountName"] == one("ServiceAccount")["metadata"]["name"]


def test_probes_are_routes_of_the_server(container):
    paths = {route.path for route in ROUTES if isinstance(route, Route)}
    assert container["readinessProbe"]["httpGet"]["path"] == "/ready"
    assert {"/ready", container["livenessProbe"]["httpGet"]["path"]} <= paths


def test_commands_are_the_real_ones_and_listen_where_they_are_asked(container):
    [words] = re.findall(r"^CMD (\[.*\])$", DOCKERFILE, re.MULTILINE)
    for command in (container["args"], COMPOSE["services"]["ropewalk"]["command"], yaml.safe_load(words)):
        asked = parse(command)
        assert (asked.host, asked.port, str(asked.data)) == ("0.0.0.0", container["ports"][0]["containerPort"], "/data")


def test_whoever_stops_a_server_waits_until_it_has_stopped(pod, container):
    compose = COMPOSE["services"]["ropewalk"]
    assert pod["terminationGracePeriodSeconds"] > stops_in(container["args"])
    assert int(compose["stop_grace_period"].removesuffix("s")) > stops_in(compose["command"])


def test_nothing_runs_as_root_and_no_secret_is_written_down(pod, container):
    user = int(re.findall(r"^USER (\d+)$", DOCKERFILE, re.MULTILINE)[0])
    assert pod["securityContext"]["runAsUser"] == user > 0
    assert container["securityContext"]["capabilities"]["drop"] == COMPOSE["services"]["ropewalk"]["cap_drop"] == ["ALL"]
    assert all("secretKeyRef" in variable["valueFrom"] for variable in container["env"])
    for service in COMPOSE["services"].values():
        assert all("${" in text for name, text in service["environment"].items() if "PASSWORD" in name or "URL" in name)


def test_the_compose_file_names_only_what_it_has():
    services = COMPOSE["services"]
    for service in services.values():
        assert {volume.split(":")[0] for volume in service["volumes"]} <= set(COMPOSE["volumes"])
        assert set(service.get("secrets", ())) <= set(COMPOSE["secrets"])
        assert set(service.get("depends_on", ())) <= set(services)
    assert (DEPLOY / services["ropewalk"]["build"]["context"] / services["ropewalk"]["build"]["dockerfile"]).exists()


def test_the_image_copies_what_there_is_and_installs_extras_that_there_are():
    for line in re.findall(r"^COPY (.+) \S+$", DOCKERFILE, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())
    extras = re.findall(r"\.\[([\w,]+)\]", DOCKERFILE)[0].split(",")
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)


def test_what_the_page_has_people_make_is_what_is_asked_for(container):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    keys = {variable["valueFrom"]["secretKeyRef"]["key"] for variable in container["env"]}
    assert set(re.findall(r"--from-literal=([a-z-]+)=", page)) == keys
    assert f"deploy/{Path(COMPOSE['secrets']['root_key']['file']).name}" in page
