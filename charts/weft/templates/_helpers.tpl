{{/* Labels of everything. Takes (dict "root" $ "component" NAME). */}}
{{- define "weft.labels" -}}
{{ include "weft.selector" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/part-of: weft
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version | replace "+" "_" }}
{{- end }}

{{/* What selects the pods of a component; never changes, because a DaemonSet's selector cannot. */}}
{{- define "weft.selector" -}}
app.kubernetes.io/name: {{ .component }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
{{- end }}

{{/* An image. Takes (dict "root" $ "image" VALUES). */}}
{{- define "weft.image" -}}
{{- $name := .image.repository }}
{{- with .root.Values.image.registry }}{{ $name = printf "%s/%s" (trimSuffix "/" .) $name }}{{ end }}
{{- if .image.digest }}{{ printf "%s@%s" $name .image.digest }}
{{- else }}{{ printf "%s:%s" $name (.root.Values.image.tag | default .root.Chart.AppVersion) }}
{{- end }}
{{- end }}

{{/* The host's part of a path: what comes before $(NODE_NAME). Mounts of the rest use subPathExpr, since the path of a
hostPath volume knows no variables. */}}
{{- define "weft.hostBase" -}}
{{- regexReplaceAll "/[$][(].*$" . "" | default "/" }}
{{- end }}

{{/* The rest of a path from $(NODE_NAME) on; empty without one. */}}
{{- define "weft.hostRest" -}}
{{- if contains "$(" . }}{{ trimPrefix (include "weft.hostBase" .) . | trimPrefix "/" }}{{ end }}
{{- end }}

{{/* A hostPath volume. Takes (dict "name" NAME "path" PATH "type" TYPE). */}}
{{- define "weft.hostVolume" -}}
- name: {{ .name }}
  hostPath:
    path: {{ include "weft.hostBase" .path }}
    {{- /* What comes before $(NODE_NAME) is there; what comes behind it, the kubelet makes. */}}
    type: {{ contains "$(" .path | ternary "Directory" .type }}
{{- end }}

{{/* The mount of such a volume. Takes (dict "name" NAME "path" PATH "at" PLACE). */}}
{{- define "weft.hostMount" -}}
- name: {{ .name }}
  mountPath: {{ .at }}
  {{- with include "weft.hostRest" .path }}
  subPathExpr: {{ . }}
  {{- end }}
{{- end }}

{{/* Name of the control plane's Service, as agents dial it and its certificate names it. */}}
{{- define "weft.controlHost" -}}
weft-control.{{ .Release.Namespace }}.svc
{{- end }}

{{/* What a schema cannot say. */}}
{{- define "weft.validate" -}}
{{- $ports := .Values.agent.ports }}
{{- $all := list (int $ports.metrics) (int $ports.readiness) (int $ports.admin) }}
{{- if ne (len (uniq $all)) 3 }}
{{- fail (printf "agent.ports: metrics, readiness and admin must be three different ports, not %v" $all) }}
{{- end }}
{{- range $name, $port := $ports }}
{{- if has (int $port) (list 15001 15006 15008) }}
{{- fail (printf "agent.ports.%s: %d is one of the ports that the agent opens in every pod (15001, 15006, 15008)" $name (int $port)) }}
{{- end }}
{{- end }}
{{- if eq (int .Values.control.ports.discovery) (int .Values.control.ports.metrics) }}
{{- fail "control.ports: discovery and metrics must be different ports" }}
{{- end }}
{{- if lt (int .Values.agent.drain.upgradeSeconds) (int .Values.agent.drain.stopSeconds) }}
{{- fail "agent.drain: upgradeSeconds must not be less than stopSeconds" }}
{{- end }}
{{- if gt (int .Values.agent.certificateLifetimeSeconds) (int .Values.control.certificateMaxLifetimeSeconds) }}
{{- fail "agent.certificateLifetimeSeconds is more than the control plane signs (control.certificateMaxLifetimeSeconds)" }}
{{- end }}
{{- if and (eq .Values.control.antiAffinity "hard") (lt (int .Values.control.replicas) 2) }}
{{- fail "control.antiAffinity: `hard` means nothing with less than 2 replicas" }}
{{- end }}
{{- if and (contains "$(" .Values.hostPaths.netns) (eq (include "weft.hostBase" .Values.hostPaths.netns) "/") }}
{{- fail "hostPaths.netns: $(NODE_NAME) cannot be its first part, since what comes before it is mounted" }}
{{- end }}
{{- end }}

{{/* Arguments of the control plane. */}}
{{- define "weft.controlArgs" -}}
- run
- --source=kubernetes
- --listen=[::]:{{ .Values.control.ports.discovery }}
- --metrics-addr=[::]:{{ .Values.control.ports.metrics }}
- --tls-name={{ include "weft.controlHost" . }}
- --trust-domain={{ .Values.mesh.trustDomain }}
- --cluster-id={{ .Values.mesh.cluster }}
- --cluster-domain={{ .Values.mesh.clusterDomain }}
- --network={{ .Values.mesh.network }}
- --root-namespace={{ .Release.Namespace }}
- --leaf-max-lifetime={{ .Values.control.certificateMaxLifetimeSeconds }}
- --ca-secret={{ .Values.ca.secretName }}
- --ca-create={{ .Values.ca.create }}
- --agent-account={{ .Release.Namespace }}/weft-agent
{{- end }}

{{/* Annotations of what cleans the nodes after `helm uninstall`. */}}
{{- define "weft.uninstallHook" -}}
helm.sh/hook: post-delete
helm.sh/hook-delete-policy: before-hook-creation,hook-succeeded
{{- end }}
