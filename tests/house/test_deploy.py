"""What is in deploy/: of its schemas to the last field, references lead somewhere, commands are real, and there is time to stop."""

import re
from copy import deepcopy
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose
from starlette.routing import Route

from ropewalk.cli import parse
from ropewalk.server.app import ROUTES
from ropewalk.server.settings import ServerSettings

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
COMPOSE_TEXT = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load(COMPOSE_TEXT)
VERSION = "1.31"  # of Kubernetes: the oldest whose fields are used


def objects(folder):
    return [found for path in sorted(folder.glob("*.yaml")) for found in yaml.safe_load_all(path.read_text(encoding="utf-8"))]


OBJECTS, MORE = objects(DEPLOY / "kubernetes"), objects(DEPLOY / "kubernetes" / "more")
KINDS = {"ServiceAccount": "v1", "PersistentVolumeClaim": "v1", "Service": "v1", "Deployment": "apps/v1"}
KINDS |= {"NetworkPolicy": "networking.k8s.io/v1"}
VLLM = re.search(r"vllm serve (.*?)\n\n", (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8"), re.DOTALL)[1]
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")


def one(kind, among=OBJECTS):
    [found] = [each for each in among if each["kind"] == kind]
    return found


def ray_pods():
    """The pods of the Ray cluster: of its kind, which is KubeRay's own, they alone have a schema here."""
    spec = one("RayCluster", MORE)["spec"]
    groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
    return [{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": g["template"]["spec"]} for g in groups]


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


CORE = [each for each in [*OBJECTS, *MORE] if each["kind"] != "RayCluster"] + ray_pods()


@pytest.mark.parametrize("found", CORE, ids=lambda found: f"{found['kind']}-{found['metadata']['name']}")
def test_every_object_is_of_its_schema_and_has_no_field_beside(found):
    kubernetes_validate.validate(found, VERSION, strict=True)


@pytest.mark.parametrize(("path", "value"), [(("spec", "replicsa"), 1), (("spec", "replicas"), "one"), (("sepc",), {})])
def test_the_schemas_find_what_is_misspelt_or_of_the_wrong_kind(path, value):
    wrong = deepcopy(one("Deployment"))
    place = wrong
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSION, strict=True)


def test_the_compose_file_is_of_the_specification():
    assert set(PyCompose.from_yaml(COMPOSE_TEXT).service_names()) == set(COMPOSE["services"])
    for good, wrong in {"restart:": "restrat:", "service_healthy": "service_heathy", "retries: 3": "retries: few"}.items():
        with pytest.raises(ValueError, match="services"):
            PyCompose.from_yaml(COMPOSE_TEXT.replace(good, wrong))


def test_what_stands_beside_the_server_leads_somewhere():
    claims = {each["metadata"]["name"] for each in MORE if each["kind"] == "PersistentVolumeClaim"}
    vllm, cluster = one("Deployment", MORE)["spec"]["template"], one("RayCluster", MORE)["spec"]
    pods = [vllm["spec"], *(pod["spec"] for pod in ray_pods())]
    for pod in pods:
        volumes = pod.get("volumes", ())
        assert {v["persistentVolumeClaim"]["claimName"] for v in volumes if "persistentVolumeClaim" in v} <= claims
        mounted = {mount["name"] for each in pod["containers"] for mount in each.get("volumeMounts", ())}
        assert mounted == {volume["name"] for volume in volumes}
    assert one("Service", MORE)["spec"]["selector"].items() <= vllm["metadata"]["labels"].items()
    server = one("Deployment")["spec"]["template"]["metadata"]["labels"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    labels = [vllm["metadata"]["labels"], *(group["template"]["metadata"]["labels"] for group in groups)]
    for policy in (each["spec"] for each in MORE if each["kind"] == "NetworkPolicy"):
        assert any(policy["podSelector"]["matchLabels"].items() <= some.items() for some in labels)
        allowed = [peer["podSelector"]["matchLabels"] for peer in policy["ingress"][0]["from"]]
        assert any(some.items() <= server.items() for some in allowed)
    assert f"ray=={cluster['rayVersion']}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")


def test_the_page_says_where_they_are_and_a_server_can_read_it():
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    [text] = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    service = one("Service", MORE)
    address = f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert yaml.safe_load(text)["vllm"]["url"] == address
    assert f"ray://{one('RayCluster', MORE)['metadata']['name']}-head-svc:10001" in text
    asked = one("Deployment", MORE)["spec"]["template"]["spec"]["containers"][0]
    options = {option.partition("=")[0] for option in asked["args"]}
    assert options == set(re.findall(r"--[a-z-]+(?:\.[a-z]+)?", VLLM)) - {"--api-key"}  # it is in the environment


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
    told = [*DEPLOY.rglob("*.yaml"), DEPLOY / "Dockerfile"]
    extras = {
        extra for path in told for found in re.findall(r"EXTRAS=([\w,]+)", path.read_text()) for extra in found.split(",")
    }
    assert {"postgres", "cluster"} <= extras
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", text, re.MULTILINE) for extra in extras)
    installed = re.findall(r"^RUN pip install (.*)$", DOCKERFILE, re.MULTILINE)
    assert all("--constraint constraints.txt" in line for line in installed)
    assert "torch" in installed[0].split()  # by itself: the other line finds it there, from whatever index


def test_what_the_page_has_people_make_is_what_is_asked_for(container):
    page = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
    vllm = one("Deployment", MORE)["spec"]["template"]["spec"]["containers"][0]
    asked = [variable["valueFrom"] for variable in (*container["env"], *vllm["env"]) if "valueFrom" in variable]
    keys = {source["secretKeyRef"]["key"] for source in asked}
    assert set(re.findall(r"--from-literal=([a-z-]+)=", page)) == keys
    assert f"deploy/{Path(COMPOSE['secrets']['root_key']['file']).name}" in page
