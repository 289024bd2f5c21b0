"""The files of deploy/ and compose.yaml: valid by their schemas, and in agreement with the settings and the image."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import kubernetes_validate
import pytest
import yaml
from conftest import ROOT
from image_builder import steps

from settings import SECTIONS, ServerSettings, Settings, load_settings
from store import is_database

KUBERNETES = "1.34"
COMPOSE = ROOT / "compose.yaml"
COMPOSE_REPLICAS = ROOT / "deploy" / "compose.replicas.yaml"
SIDECAR = ROOT / "deploy" / "kubernetes" / "sidecar.yaml"
REPLICAS = ROOT / "deploy" / "kubernetes" / "replicas.yaml"
POSTGRES = ROOT / "deploy" / "kubernetes" / "postgres.yaml"
UNIT = ROOT / "deploy" / "systemd" / "responses-proxy.service"
DOCUMENTS = [ROOT / "docs" / name for name in ("backends.md", "deploy.md", "scaling.md")]
GRACE_S = ServerSettings().shutdown_grace_s
# The store gets so long after the grace for an answer that is being saved: docs/background.md.
SAVING_S = 5


def instruction(word: str) -> str:
    """What follows a word that is once in the Dockerfile."""
    (rest,) = (rest for each, rest in steps((ROOT / "Dockerfile").read_text()) if each == word)
    return rest


def settings_of(environ: dict[str, str], path: Path | None = None) -> Settings:
    return load_settings(path, environ, {})


# -- compose -----------------------------------------------------------------------------------------------------------


def check_compose(path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


@pytest.fixture
def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


@pytest.mark.parametrize("path", [COMPOSE, COMPOSE_REPLICAS], ids=lambda path: path.name)
def test_compose_is_valid_by_its_schema(path: Path) -> None:
    done = check_compose(path)
    assert done.returncode == 0, done.stdout


def test_the_schema_of_compose_finds_a_wrong_word(tmp_path: Path) -> None:
    wrong = tmp_path / "compose.yaml"
    wrong.write_text(COMPOSE.read_text().replace("read_only:", "readonly:"))
    done = check_compose(wrong)
    assert (done.returncode, "readonly" in done.stdout) == (1, True)


def test_compose_sets_what_are_settings(services: dict[str, Any]) -> None:
    (upstream,) = settings_of(services["proxy"]["environment"]).upstream
    assert upstream.base_url == "http://ollama:11434/v1"


def test_compose_gives_the_proxy_no_more_than_it_needs(services: dict[str, Any]) -> None:
    proxy = services["proxy"]
    assert (proxy["read_only"], proxy["cap_drop"], proxy["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert proxy["volumes"] == [f"store:{instruction('VOLUME')}"]
    assert proxy["ports"] == [f"127.0.0.1:8080:{instruction('EXPOSE')}"]


def test_compose_starts_the_proxy_when_the_backend_is_healthy(services: dict[str, Any]) -> None:
    assert services["proxy"]["depends_on"] == {"ollama": {"condition": "service_healthy"}}
    assert "healthcheck" in services["ollama"]


def test_compose_leaves_running_turns_their_time(services: dict[str, Any]) -> None:
    assert int(services["proxy"]["stop_grace_period"].removesuffix("s")) > GRACE_S + SAVING_S


# -- Kubernetes --------------------------------------------------------------------------------------------------------


OBJECTS, THREE, DATABASE = (list(yaml.safe_load_all(path.read_text())) for path in (SIDECAR, REPLICAS, POSTGRES))


def the(kind: str, of: list[dict[str, Any]] = OBJECTS) -> dict[str, Any]:
    (found,) = (each for each in of if each["kind"] == kind)
    return found


@pytest.fixture
def pod() -> dict[str, Any]:
    found: dict[str, Any] = the("Deployment")["spec"]["template"]["spec"]
    return found


@pytest.fixture
def proxy(pod: dict[str, Any]) -> dict[str, Any]:
    return container(pod, "proxy")


def container(pod: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = (each for each in pod["containers"] if each["name"] == name)
    return found


def environ_of(container: dict[str, Any]) -> dict[str, str]:
    """The variables; one of the Secret has its key as its value."""
    return {
        each["name"]: each["value"] if "value" in each else each["valueFrom"]["secretKeyRef"]["key"]
        for each in container["env"]
    }


@pytest.mark.parametrize(
    "found",
    [*OBJECTS, *THREE, *DATABASE],
    ids=lambda found: f"{found['kind']}/{found['metadata']['name']}",
)
def test_every_object_is_valid_by_its_schema(found: dict[str, Any]) -> None:
    assert kubernetes_validate.validate(found, KUBERNETES, strict=True) == KUBERNETES


def test_the_schema_of_kubernetes_finds_a_wrong_word() -> None:
    wrong = yaml.safe_load(yaml.safe_dump(the("Deployment")).replace("readOnlyRootFilesystem", "readOnlyRoot"))
    with pytest.raises(kubernetes_validate.ValidationError, match="readOnlyRoot"):
        kubernetes_validate.validate(wrong, KUBERNETES, strict=True)


def test_the_settings_of_the_pod_load_and_lead_to_its_backend(
    pod: dict[str, Any], proxy: dict[str, Any], tmp_path: Path
) -> None:
    (name, text), *others = the("ConfigMap")["data"].items()
    (tmp_path / name).write_text(text)
    environ = environ_of(proxy)
    assert not others
    assert environ["RESPONSES_PROXY_CONFIG"] == f"{mount_path(proxy, 'config')}/{name}"
    (upstream,) = settings_of(environ, tmp_path / name).upstream
    port = upstream.base_url.removesuffix("/v1").rpartition(":")[2]
    backend = container(pod, "vllm")
    assert f"--port={port}" in backend["command"]
    assert environ[upstream.api_key_env] == environ_of(backend)["VLLM_API_KEY"]


def mount_path(container: dict[str, Any], name: str) -> str:
    (found,) = (each["mountPath"] for each in container["volumeMounts"] if each["name"] == name)
    return str(found)


def test_the_store_of_the_pod_is_where_the_image_keeps_it(pod: dict[str, Any], proxy: dict[str, Any]) -> None:
    assert mount_path(proxy, "store") == instruction("VOLUME")
    user = int(instruction("USER").partition(":")[0])
    context = proxy["securityContext"]
    assert {context["runAsUser"], context["runAsGroup"], pod["securityContext"]["fsGroup"]} == {user}


def test_every_volume_of_the_pod_is_there(pod: dict[str, Any]) -> None:
    mounted = {each["name"] for container in pod["containers"] for each in container["volumeMounts"]}
    assert mounted == {each["name"] for each in pod["volumes"]}
    claims = {each["persistentVolumeClaim"]["claimName"] for each in pod["volumes"] if "persistentVolumeClaim" in each}
    assert claims == {each["metadata"]["name"] for each in OBJECTS if each["kind"] == "PersistentVolumeClaim"}


@pytest.mark.parametrize("objects", [OBJECTS, THREE], ids=["sidecar", "replicas"])
def test_the_pod_gives_the_proxy_no_more_than_it_needs(objects: list[dict[str, Any]]) -> None:
    proxy = container(the("Deployment", objects)["spec"]["template"]["spec"], "proxy")
    assert proxy["securityContext"] == {
        "runAsNonRoot": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }


def test_the_probes_and_the_service_meet_the_port(proxy: dict[str, Any]) -> None:
    (port,) = proxy["ports"]
    assert port["containerPort"] == int(instruction("EXPOSE"))
    probes = {kind: proxy[f"{kind}Probe"]["httpGet"] for kind in ("liveness", "readiness")}
    assert {kind: probe["path"] for kind, probe in probes.items()} == {"liveness": "/healthz", "readiness": "/readyz"}
    (service,) = the("Service")["spec"]["ports"]
    assert {service["targetPort"], *(probe["port"] for probe in probes.values())} == {port["name"]}


def test_the_service_finds_the_pod() -> None:
    deployment = the("Deployment")["spec"]
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == the("Service")["spec"]["selector"]


def test_one_pod_at_a_time_has_the_store() -> None:
    deployment = the("Deployment")["spec"]
    assert (deployment["replicas"], deployment["strategy"]) == (1, {"type": "Recreate"})


def test_the_pod_leaves_running_turns_their_time_and_their_backend(pod: dict[str, Any], proxy: dict[str, Any]) -> None:
    before_s, backend_s = (int(each["lifecycle"]["preStop"]["exec"]["command"][1]) for each in pod["containers"])
    assert proxy is pod["containers"][0]
    assert backend_s > before_s + GRACE_S + SAVING_S
    assert pod["terminationGracePeriodSeconds"] > backend_s


@pytest.mark.parametrize("objects", [OBJECTS, THREE], ids=["sidecar", "replicas"])
def test_the_pod_has_the_image_of_this_version(objects: list[dict[str, Any]]) -> None:
    proxy = container(the("Deployment", objects)["spec"]["template"]["spec"], "proxy")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert proxy["image"].rpartition("/")[2] == f"responses-proxy:{version}"


# -- three replicas ----------------------------------------------------------------------------------------------------

# In the head of the manifest: what goes into the Secret.
LINE = re.compile(r"^#   ([A-Z_]+)=(\S+)", re.MULTILINE)
# In a file of Compose: what stands for a variable that is not set.
DEFAULT = re.compile(r"\$\{\w+:-(.*)\}")
# PostgreSQL keeps so many for superusers.
RESERVED_CONNECTIONS = 3


@pytest.fixture
def deployment() -> dict[str, Any]:
    found: dict[str, Any] = the("Deployment", THREE)["spec"]
    return found


@pytest.fixture
def replica(deployment: dict[str, Any]) -> dict[str, Any]:
    (only,) = deployment["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.fixture
def secret() -> dict[str, str]:
    return dict(LINE.findall(REPLICAS.read_text()))


@pytest.fixture
def told(secret: dict[str, str], replica: dict[str, Any], tmp_path: Path) -> Settings:
    """The settings of a replica."""
    ((name, text),) = the("ConfigMap", THREE)["data"].items()
    (tmp_path / name).write_text(text)
    environ = {each["name"]: each["value"] for each in replica["env"]}
    assert environ["RESPONSES_PROXY_CONFIG"] == f"{mount_path(replica, 'config')}/{name}"
    return settings_of({**environ, **secret}, tmp_path / name)


def test_the_secret_tells_the_database_and_the_keys(secret: dict[str, str], told: Settings) -> None:
    assert told.store.path == secret["RESPONSES_PROXY_STORE__PATH"]
    assert is_database(told.store.path)
    assert ":" not in told.store.path.partition("://")[2].partition("@")[0], "a password in an address"
    assert told.sealing.keys
    assert {"PGPASSWORD", *(each.api_key_env for each in told.upstream)} <= set(secret)


def test_several_sealing_keys_come_from_one_variable() -> None:
    assert settings_of({"RESPONSES_PROXY_SEALING__KEYS": "first, second"}).sealing.keys == ("first", "second")


def test_no_list_of_processes_shows_a_secret(replica: dict[str, Any], secret: dict[str, str]) -> None:
    assert replica["envFrom"] == [{"secretRef": {"name": "responses-proxy"}}]
    assert not {"args", "command"} & set(replica)
    assert not secret.keys() & {each["name"] for each in replica["env"]}
    assert "kubectl create secret generic responses-proxy --from-env-file=" in REPLICAS.read_text()


def test_an_update_takes_no_replica_away_before_another_one_is_ready(deployment: dict[str, Any]) -> None:
    assert deployment["replicas"] == 3
    assert deployment["strategy"] == {
        "type": "RollingUpdate",
        "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1},
    }
    budget = the("PodDisruptionBudget", THREE)["spec"]
    assert budget["minAvailable"] == deployment["replicas"] - 1
    assert budget["selector"] == deployment["selector"]


def test_a_replica_is_out_of_the_service_before_it_stops_and_ends_its_turns(
    deployment: dict[str, Any], replica: dict[str, Any]
) -> None:
    before_s = int(replica["lifecycle"]["preStop"]["exec"]["command"][1])
    assert before_s > replica["readinessProbe"]["periodSeconds"]
    assert deployment["template"]["spec"]["terminationGracePeriodSeconds"] > before_s + GRACE_S + SAVING_S


def test_a_replica_is_started_kept_and_asked_by_the_routes_for_it(replica: dict[str, Any]) -> None:
    paths = {kind: replica[f"{kind}Probe"]["httpGet"]["path"] for kind in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/healthz", "liveness": "/healthz", "readiness": "/readyz"}
    (port,) = replica["ports"]
    (service,) = the("Service", THREE)["spec"]["ports"]
    assert (port["containerPort"], port["name"]) == (int(instruction("EXPOSE")), service["targetPort"])


def test_a_replica_may_write_where_the_image_does(deployment: dict[str, Any], replica: dict[str, Any]) -> None:
    volumes = {each["name"] for each in deployment["template"]["spec"]["volumes"]}
    assert {each["name"] for each in replica["volumeMounts"]} == volumes
    assert mount_path(replica, "data") == instruction("VOLUME")


def test_replicas_keep_apart_and_are_found(deployment: dict[str, Any]) -> None:
    labels = deployment["template"]["metadata"]["labels"]
    assert labels == deployment["selector"]["matchLabels"] == the("Service", THREE)["spec"]["selector"]
    (spread,) = deployment["template"]["spec"]["topologySpreadConstraints"]
    assert (spread["topologyKey"], spread["labelSelector"]) == ("kubernetes.io/hostname", deployment["selector"])


def test_the_example_of_a_database_has_connections_for_all_of_them(deployment: dict[str, Any], told: Settings) -> None:
    (database,) = the("StatefulSet", DATABASE)["spec"]["template"]["spec"]["containers"]
    (given,) = (int(each.partition("=")[2]) for each in database["args"] if each.startswith("max_connections="))
    replicas = deployment["replicas"] + deployment["strategy"]["rollingUpdate"]["maxSurge"]
    assert replicas * (told.store.pool_size + 1) < given - RESERVED_CONNECTIONS


def test_the_example_of_a_database_is_the_one_that_the_secret_names(secret: dict[str, str]) -> None:
    (database,) = the("StatefulSet", DATABASE)["spec"]["template"]["spec"]["containers"]
    environ = environ_of(database)
    address = urlsplit(secret["RESPONSES_PROXY_STORE__PATH"])
    host = the("Service", DATABASE)["metadata"]["name"]
    assert (address.username, address.hostname, address.path[1:]) == (
        environ["POSTGRES_USER"],
        host,
        environ["POSTGRES_DB"],
    )
    assert environ["POSTGRES_PASSWORD"] == "PGPASSWORD"
    assert "TRY" in POSTGRES.read_text().partition("\n")[0]


def test_compose_has_three_replicas_of_one_database() -> None:
    services = yaml.safe_load(COMPOSE_REPLICAS.read_text())["services"]
    proxy = services["proxy"]
    found = settings_of({name: DEFAULT.sub(r"\1", value) for name, value in proxy["environment"].items()})
    assert (proxy["deploy"]["replicas"], is_database(found.store.path)) == (3, True)
    assert (proxy["read_only"], proxy["cap_drop"], proxy["security_opt"]) == (True, ["ALL"], ["no-new-privileges:true"])
    assert int(proxy["stop_grace_period"].removesuffix("s")) > GRACE_S + SAVING_S
    assert "ports" not in proxy
    secrets = (proxy["environment"]["PGPASSWORD"], proxy["environment"]["RESPONSES_PROXY_SEALING__KEYS"])
    assert all(each.startswith("${") and ":?" in each for each in secrets)
    assert services["balancer"]["ports"] == ["127.0.0.1:8080:80"]


# -- systemd -----------------------------------------------------------------------------------------------------------


def unit() -> dict[str, list[str]]:
    """The settings of [Service], in order."""
    section = UNIT.read_text().partition("[Service]")[2].partition("\n[")[0]
    found: dict[str, list[str]] = {}
    for name, _, value in (line.partition("=") for line in section.splitlines() if line and not line.startswith("#")):
        found.setdefault(name, []).append(value)
    return found


@pytest.fixture
def analysed(tmp_path: Path) -> tuple[str, Path]:
    """The tool, and the unit with a program that is there."""
    found = shutil.which("systemd-analyze")
    if not found:
        pytest.skip("there is no systemd-analyze")
    path = tmp_path / UNIT.name
    path.write_text(UNIT.read_text().replace(unit()["ExecStart"][0].split()[0], sys.executable))
    return found, path


def analyse(*words: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, timeout=30)


def test_systemd_has_no_complaint(analysed: tuple[str, Path]) -> None:
    tool, path = analysed
    done = analyse(tool, "verify", path)
    assert (done.returncode, done.stderr) == (0, "")


def test_systemd_would_complain_of_a_wrong_word(analysed: tuple[str, Path]) -> None:
    tool, path = analysed
    path.write_text(path.read_text().replace("ProtectSystem=", "ProtectSytem="))
    assert "ProtectSytem" in analyse(tool, "verify", path).stderr


def test_the_service_is_exposed_to_little(analysed: tuple[str, Path]) -> None:
    """At most 2 of 10, as systemd itself weighs it."""
    tool, path = analysed
    done = analyse(tool, "security", "--offline=true", "--no-pager", "--threshold=20", path)
    if "unrecognized option" in done.stderr:
        pytest.skip("this systemd-analyze weighs loaded units only")
    assert done.returncode == 0, done.stdout[-200:]


def test_the_service_leaves_running_turns_their_time() -> None:
    (stop_s,) = unit()["TimeoutStopSec"]
    assert int(stop_s) > GRACE_S + SAVING_S
    assert unit()["Restart"] == ["on-failure"]


def test_the_service_keeps_its_store_in_its_state_directory() -> None:
    (state,) = unit()["StateDirectory"]
    assert unit()["DynamicUser"] == ["yes"]
    assert unit()["WorkingDirectory"] == [f"%S/{state}"]
    pairs = dict(pair.split("=") for line in unit()["Environment"] for pair in line.split())
    assert settings_of(pairs).store.path == f"%S/{state}/responses.db"


def test_the_service_is_given_the_settings_that_it_names() -> None:
    (credential,) = unit()["LoadCredential"]
    (command,) = unit()["ExecStart"]
    assert command.endswith(f"/bin/responses-proxy --config %d/{credential.partition(':')[0]}")


# -- documents ---------------------------------------------------------------------------------------------------------


def snippets() -> list[Any]:
    found = []
    for path in DOCUMENTS:
        for number, text in enumerate(re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL), 1):
            found.append(pytest.param(text, id=f"{path.stem}-{number}"))
    return found


@pytest.mark.parametrize("text", snippets())
def test_every_settings_file_in_the_documents_loads(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text(text)
    assert settings_of({}, tmp_path / "config.toml") != Settings()


FILES = [ROOT / "Dockerfile", COMPOSE, COMPOSE_REPLICAS, SIDECAR, REPLICAS, UNIT, *DOCUMENTS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_variable_of_ours_is_a_setting(path: Path) -> None:
    for section, key in re.findall(r"RESPONSES_PROXY_([A-Z]+)__([A-Z_]+)", path.read_text()):
        assert key.lower() in SECTIONS[section.lower()].__dataclass_fields__, f"{section}__{key}"
