{{/* Names. KubeRay derives "<name>-serve-svc" and more from ours, hence the short limit. */}}
{{- define "tandem.fullname" -}}
{{- if contains .Chart.Name .Release.Name }}{{ .Release.Name | trunc 40 | trimSuffix "-" }}
{{- else }}{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 40 | trimSuffix "-" }}{{ end }}
{{- end }}

{{/* What all our pods share. KubeRay has values of its own for app.kubernetes.io/name, so that label is not among them. */}}
{{- define "tandem.selector" -}}
app.kubernetes.io/part-of: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "tandem.labels" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
{{ include "tandem.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end }}

{{- define "tandem.image" -}}
{{- $repository := required "image.repository: name the image you built with the repository's Dockerfile; the project publishes none" .Values.image.repository -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end }}

{{- define "tandem.secret" -}}
{{- required "secrets.existingSecret: name a Secret of this namespace with the keys auth_token (Ray), api_key (HTTP) and cluster_secret (between workers)" .Values.secrets.existingSecret -}}
{{- end }}

{{/* What Tandem reads: its own sections and lists as they are, and what this chart decides: where it listens, and files. */}}
{{- define "tandem.config" -}}
{{- range $section := list "model" "prefill" "decode" }}
{{- with index $.Values $section }}
{{ $section }}:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
gateway:
{{- toYaml (merge (dict "host" "0.0.0.0" "port" 8000) .Values.gateway) | nindent 2 }}
scheduler:
{{- $files := dict }}
{{- if .Values.tenants.existingSecret }}{{ $_ := set $files "tenants_file" "/etc/tandem/tenants/tenants.yaml" }}{{ end }}
{{- toYaml (merge $files .Values.scheduler) | nindent 2 }}
transfer:
{{- toYaml (merge (dict "port_range" .Values.portRange) .Values.transfer) | nindent 2 }}
{{- with .Values.also }}
also:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.overflow }}
overflow:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}

{{/* All models' pools of one role, as JSON: {"pools": [...]}. dict: root, role. What a further model leaves out has the
     configuration's default of one worker, not the first model's number. */}}
{{- define "tandem.pools" -}}
{{- $pools := list (index .root.Values .role) -}}
{{- $role := .role -}}
{{- range .root.Values.also }}{{ $pools = append $pools (merge (dict) (default dict (index . $role)) (dict "replicas" 1)) }}{{ end -}}
{{- dict "pools" $pools | toJson -}}
{{- end }}

{{/* A bound of a pool: the value of a key, or replicas where there is none. dict: pool, key. */}}
{{- define "tandem.bound" -}}
{{- $value := index .pool .key -}}
{{- if kindIs "invalid" $value }}{{ int .pool.replicas }}{{ else }}{{ int $value }}{{ end -}}
{{- end }}

{{/* Pods of one role: the sum over all models of workers times pipeline stages. dict: root, role, key. */}}
{{- define "tandem.pods" -}}
{{- $key := .key -}}
{{- $sum := 0 -}}
{{- range (include "tandem.pools" . | fromJson).pools -}}
{{- $pp := int (default 1 (index . "pp")) -}}
{{- $sum = add $sum (mul $pp (int (include "tandem.bound" (dict "pool" . "key" $key)))) -}}
{{- end -}}
{{- $sum -}}
{{- end }}

{{/* Tensor ranks of a pod of one role; the same in all models, so that every worker fits into every pod. dict: root, role. */}}
{{- define "tandem.tp" -}}
{{- $role := .role -}}
{{- $tps := list -}}
{{- range (include "tandem.pools" . | fromJson).pools }}{{ $tps = append $tps (int (default 1 (index . "tp"))) }}{{ end -}}
{{- if gt (len (uniq $tps)) 1 }}{{ fail (printf "also: all models need the same %s.tp, because their workers share the pods of that role; here are %v" $role $tps) }}{{ end -}}
{{- first $tps -}}
{{- end }}

{{/* "true" when some pool follows its load: then Serve has a policy of ours, and Ray's autoscaler adds and removes pods. */}}
{{- define "tandem.isSized" -}}
{{- range $role := list "prefill" "decode" -}}
{{- $fewest := include "tandem.pods" (dict "root" $ "role" $role "key" "min_replicas") -}}
{{- if ne $fewest (include "tandem.pods" (dict "root" $ "role" $role "key" "max_replicas")) }}true{{ end -}}
{{- end -}}
{{- end }}

{{- define "tandem.isIncremental" -}}
{{- if eq .Values.upgrade.type "NewClusterWithIncrementalUpgrade" }}true{{ end -}}
{{- end }}

{{/* "true" when Ray's autoscaler runs: KubeRay's incremental upgrade wants it too. */}}
{{- define "tandem.hasAutoscaler" -}}
{{- if or (contains "true" (include "tandem.isSized" .)) (eq "true" (include "tandem.isIncremental" .)) }}true{{ end -}}
{{- end }}

{{/* "true" when pods talk over ports that nobody can fix: those of NCCL and gloo, between stages or for KV. */}}
{{- define "tandem.usesAnyPort" -}}
{{- if ne "tcp" (default "auto" .Values.transfer.transport) }}true{{ end -}}
{{- range $role := list "prefill" "decode" -}}
{{- range (include "tandem.pools" (dict "root" $ "role" $role) | fromJson).pools }}{{ if gt (int (default 1 (index . "pp"))) 1 }}true{{ end }}{{ end -}}
{{- end -}}
{{- end }}

{{/* Seconds that a pod's workers have to drain, and that the pod has in all. */}}
{{- define "tandem.leaveSeconds" -}}
{{- add 40 (ceil (default 20 .Values.scheduler.drain_s)) -}}
{{- end }}
{{- define "tandem.graceSeconds" -}}
{{- $least := int (add 20 (include "tandem.leaveSeconds" .)) -}}
{{- $given := int .Values.terminationGracePeriodSeconds -}}
{{- if and (ne $given 0) (lt $given $least) }}{{ fail (printf "terminationGracePeriodSeconds %d is too short for scheduler.drain_s: it needs %d; 0 works it out" $given $least) }}{{ end -}}
{{- default $least $given -}}
{{- end }}

{{/* `ray start` options that fix every port of Ray's, so that a firewall can list them. */}}
{{- define "tandem.rayPorts" -}}
node-manager-port: "6380"
object-manager-port: "6381"
runtime-env-agent-port: "6382"
dashboard-agent-grpc-port: "6383"
dashboard-agent-listen-port: "52365"
metrics-export-port: "8080"
min-worker-port: "10002"
max-worker-port: "10999"
{{- end }}

{{/* The ports that our pods use among each other, as NetworkPolicy lists them. */}}
{{- define "tandem.innerPorts" -}}
{{- $range := splitList "-" .Values.portRange -}}
- {port: 6379, endPort: 6383, protocol: TCP} # Ray: GCS, node and object managers, agents
- {port: 8265, protocol: TCP} # Ray: dashboard and jobs API, on the head
- {port: 10002, endPort: 10999, protocol: TCP} # Ray: its workers
- {port: 52365, protocol: TCP} # Ray: agent
- {port: 8000, protocol: TCP} # HTTP
- {port: {{ index $range 0 }}, endPort: {{ index $range 1 }}, protocol: TCP} # Tandem: control and KV
{{- end }}

{{/* What every container of ours may not do. */}}
{{- define "tandem.confined" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
runAsNonRoot: true
capabilities:
  drop: [ALL]
{{- end }}

{{/* dict: path, port, period, failures */}}
{{- define "tandem.probe" -}}
httpGet:
  path: {{ .path }}
  port: {{ .port }}
periodSeconds: {{ .period }}
timeoutSeconds: 5
failureThreshold: {{ .failures }}
{{- end }}
