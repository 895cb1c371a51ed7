"""Rules that a schema cannot know. Each has its reason; exit status 1 names those that do not hold."""

import sys
import tomllib

import yaml

rendered, settings_path = sys.argv[1:]
with open(rendered) as file:
    objects = [o for o in yaml.safe_load_all(file) if o]
with open(settings_path, "rb") as file:
    settings = tomllib.load(file)
broken = []


def hold(rule, holds):
    print(f"{'ok    ' if holds else 'BROKEN'} {rule}")
    if not holds:
        broken.append(rule)


def of(kind, name=None):
    found = [o for o in objects if o["kind"] == kind and (name is None or o["metadata"]["name"] == name)]
    return found[0] if found else {}


kinds = {o["kind"] for o in objects}
cluster_scoped = {"ClusterRole", "ClusterRoleBinding", "Namespace", "CustomResourceDefinition", "PriorityClass", "StorageClass"}
hold("nothing of the cluster's own, no rights", not kinds & (cluster_scoped | {"Role", "RoleBinding"}))
hold("no pod has a token", of("ServiceAccount")["automountServiceAccountToken"] is False)

peer = of("Service", "mainstay-peer")["spec"]
hold("peers find each other before they are ready", peer["clusterIP"] == "None" and peer["publishNotReadyAddresses"] is True)
client = of("Service", "mainstay")["spec"]
hold("clients reach ready pods only", not client.get("publishNotReadyAddresses"))
hold("the service for clients has the client port alone", [p["port"] for p in client["ports"]] == [2379])

stateful = of("StatefulSet")["spec"]
pod = stateful["template"]["spec"]
container = pod["containers"][0]
hold("pods start together", stateful["podManagementPolicy"] == "Parallel")
hold("claims outlive the set", set(stateful["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"})
hold("each pod has a claim of its own", [c["metadata"]["name"] for c in stateful["volumeClaimTemplates"]] == ["data"])
hold("the set is the one that the headless service names", stateful["serviceName"] == "mainstay-peer")
hold("no variables of services", pod["enableServiceLinks"] is False)
spread = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
hold("one pod a node", [term["topologyKey"] for term in spread] == ["kubernetes.io/hostname"])

hold("liveness asks for the event loop alone", container["livenessProbe"]["httpGet"]["path"] == "/livez")
hold("start is as liveness", container["startupProbe"]["httpGet"]["path"] == "/livez")
hold("readiness is its own question", container["readinessProbe"]["httpGet"]["path"] == "/readyz")
hold("probes cost no process", all("exec" not in container[p] for p in ("livenessProbe", "readinessProbe", "startupProbe")))
prestop = container["lifecycle"]["preStop"]["exec"]["command"]
held = int(prestop[prestop.index("--hold") + 1].removesuffix("s"))
hold("a stopping pod holds first", prestop[:2] == ["/mainstay", "prestop"])
hold("the hold leaves time to close", held + 30 <= pod["terminationGracePeriodSeconds"])

job = of("Job")["spec"]["template"]["spec"]
for name, spec in (("set", pod), ("job", job)):
    one = spec["containers"][0]
    hold(f"{name}: requests are limits", one["resources"]["requests"] == one["resources"]["limits"])
    context, own = spec["securityContext"], one["securityContext"]
    restricted = (
        context["runAsNonRoot"] is True
        and context["runAsUser"] > 0
        and context["seccompProfile"]["type"] == "RuntimeDefault"
        and own["allowPrivilegeEscalation"] is False
        and own["readOnlyRootFilesystem"] is True
        and own["capabilities"] == {"drop": ["ALL"]}
    )
    hold(f"{name}: restricted", restricted)
    hold(f"{name}: no token", spec["automountServiceAccountToken"] is False)

budget = of("PodDisruptionBudget")["spec"]
hold("one disruption at a time", budget["maxUnavailable"] == 1 and budget["unhealthyPodEvictionPolicy"] == "AlwaysAllow")
policy = of("NetworkPolicy", "mainstay")["spec"]
hold("both directions are closed but for what is named", set(policy["policyTypes"]) == {"Ingress", "Egress"})
let_in = [f["podSelector"]["matchLabels"] for rule in policy["ingress"] for f in rule["from"]]
hold("clients are let in by one label", {"mainstay-client": "true"} in let_in)
labels = stateful["template"]["metadata"]["labels"]
selectors = [stateful["selector"]["matchLabels"], peer["selector"], client["selector"], policy["podSelector"]["matchLabels"]]
hold("every selector finds the pods of the set", all(s.items() <= labels.items() for s in selectors))
job_labels = of("Job")["spec"]["template"]["metadata"]["labels"]
hold("no selector finds the pod of the job", not any(s.items() <= job_labels.items() for s in selectors))
hold("no port is open to everybody", all(rule.get("from") for rule in policy["ingress"]))

members = job["containers"][0]["args"][job["containers"][0]["args"].index("--members") + 1].split(",")
peers = dict(p.split("=") for p in settings["peers"].split(","))
hold("the birth is of all replicas", len(members) == stateful["replicas"] and set(members) == set(peers))
hold("peers are the pods of the set", all(a == f"{n}.mainstay-peer:2380" for n, a in peers.items()))
hold("listening beyond loopback is said in as many words", settings["insecure-listen-anywhere"] is True)
ports = {p["name"]: p["containerPort"] for p in container["ports"]}
listens = {"client": "listen", "peer": "listen-peer", "admin": "listen-admin", "metrics": "listen-metrics"}
hold("ports are those of the settings", all(settings[s].endswith(f":{ports[p]}") for p, s in listens.items()))

print(f"{len(broken)} rules broken")
sys.exit(1 if broken else 0)
