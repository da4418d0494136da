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
{{- $repository := required "image.repository: name the image you built (python -m pip install tandem-serve on a python:3.11 base); the project publishes none" .Values.image.repository -}}
{{- printf "%s:%s" $repository (.Values.image.tag | default .Chart.AppVersion) -}}
{{- end }}

{{- define "tandem.secret" -}}
{{- required "secrets.existingSecret: name a Secret of this namespace with the keys auth_token (Ray), api_key (HTTP) and cluster_secret (between workers)" .Values.secrets.existingSecret -}}
{{- end }}

{{/* What Tandem reads: the six sections of its own configuration as they are, and where this chart makes it listen. */}}
{{- define "tandem.config" -}}
{{- range $section := list "model" "prefill" "decode" "scheduler" "transfer" }}
{{- with index $.Values $section }}
{{ $section }}:
{{- toYaml . | nindent 2 }}
{{- end }}
{{- end }}
gateway:
{{- toYaml (merge (dict "host" "0.0.0.0" "port" 8000) .Values.gateway) | nindent 2 }}
{{- end }}

{{/* A bound of a pool: the value of a key, or replicas where there is none. dict: pool, key. */}}
{{- define "tandem.bound" -}}
{{- $value := index .pool .key -}}
{{- if kindIs "invalid" $value }}{{ int .pool.replicas }}{{ else }}{{ int $value }}{{ end -}}
{{- end }}

{{/* "true" when some pool follows its load: then Serve has a policy of ours, and Ray's autoscaler adds and removes pods. */}}
{{- define "tandem.isSized" -}}
{{- range $role := list "prefill" "decode" -}}
{{- $pool := index $.Values $role -}}
{{- $fewest := include "tandem.bound" (dict "pool" $pool "key" "min_replicas") -}}
{{- if ne $fewest (include "tandem.bound" (dict "pool" $pool "key" "max_replicas")) }}true{{ end -}}
{{- end -}}
{{- end }}

{{/* One pod of one role. dict: root, role, spec (an entry of .Values.pods), isHead. No checksum of the configuration here:
     KubeRay answers a changed pod with a whole second cluster, and a changed serveConfigV2 in place. */}}
{{- define "tandem.pod" -}}
{{- $root := .root -}}
metadata:
  labels:
    {{- include "tandem.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ .role }}
spec:
  automountServiceAccountToken: {{ and .isHead (contains "true" (include "tandem.isSized" $root)) }}
  terminationGracePeriodSeconds: {{ $root.Values.terminationGracePeriodSeconds }}
  {{- with $root.Values.image.pullSecrets }}
  imagePullSecrets:
    {{- range . }}
    - name: {{ . }}
    {{- end }}
  {{- end }}
  securityContext:
    runAsNonRoot: true
    runAsUser: 1000
    runAsGroup: 1000
    fsGroup: 1000
    seccompProfile:
      type: RuntimeDefault
  {{- with .spec.nodeSelector }}
  nodeSelector:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.tolerations }}
  tolerations:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with .spec.affinity }}
  affinity:
    {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .isHead }}
      image: {{ include "tandem.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        allowPrivilegeEscalation: false
        readOnlyRootFilesystem: true
        capabilities:
          drop: [ALL]
      env:
        - name: HOME
          value: /home/tandem
        - name: HF_HOME
          value: /models
        - name: RAY_USAGE_STATS_ENABLED
          value: "0"
        - name: TANDEM_GATEWAY_API_KEY
          valueFrom:
            secretKeyRef:
              name: {{ include "tandem.secret" $root }}
              key: api_key
        - name: TANDEM_CLUSTER_SECRET
          valueFrom:
            secretKeyRef:
              name: {{ include "tandem.secret" $root }}
              key: cluster_secret
        - name: TANDEM_TRANSFER_BIND_HOST # KV and control sockets: an address that the other pods can reach
          valueFrom:
            fieldRef:
              fieldPath: status.podIP
        {{- with $root.Values.extraEnv }}
        {{- toYaml . | nindent 8 }}
        {{- end }}
      {{- if .isHead }}
      ports:
        - name: gcs
          containerPort: 6379
        - name: dashboard
          containerPort: 8265
        - name: client
          containerPort: 10001
        - name: serve
          containerPort: 8000
        - name: metrics
          containerPort: 8080
      startupProbe: {{- include "tandem.probe" (dict "path" "/api/gcs_healthz" "port" 8265 "period" 5 "failures" 60) | nindent 8 }}
      readinessProbe: {{- include "tandem.probe" (dict "path" "/api/gcs_healthz" "port" 8265 "period" 5 "failures" 3) | nindent 8 }}
      livenessProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 10 "failures" 12) | nindent 8 }}
      {{- else }}
      ports:
        - name: serve
          containerPort: 8000
        - name: metrics
          containerPort: 8080
      startupProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 5 "failures" 60) | nindent 8 }}
      readinessProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 5 "failures" 3) | nindent 8 }}
      livenessProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 10 "failures" 12) | nindent 8 }}
      lifecycle:
        preStop: # endpoints forget this pod before Serve begins to drain it
          exec:
            command: [sleep, "5"]
      {{- end }}
      resources:
        {{- toYaml .spec.resources | nindent 8 }}
      volumeMounts:
        - name: tmp
          mountPath: /tmp
        - name: home
          mountPath: /home/tandem
        - name: shm
          mountPath: /dev/shm
        - name: models
          mountPath: /models
  volumes:
    - name: tmp
      emptyDir: {}
    - name: home
      emptyDir: {}
    - name: shm # Ray's object store; KV between pods travels over tcp
      emptyDir:
        medium: Memory
        sizeLimit: {{ .spec.shmSize }}
    - name: models
      {{- with $root.Values.models.existingClaim }}
      persistentVolumeClaim:
        claimName: {{ . }}
      {{- else }}
      emptyDir: {}
      {{- end }}
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
