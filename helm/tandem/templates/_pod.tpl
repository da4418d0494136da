{{/* One pod of one role. dict: root, role, spec (an entry of .Values.pods), isHead. No checksum of the configuration here:
     KubeRay answers a changed pod with a whole second cluster, and a changed serveConfigV2 in place. */}}
{{- define "tandem.pod" -}}
{{- $root := .root -}}
{{- $role := .role -}}
metadata:
  labels:
    {{- include "tandem.selector" $root | nindent 4 }}
    app.kubernetes.io/component: {{ $role }}
spec:
  automountServiceAccountToken: {{ and .isHead (eq "true" (include "tandem.hasAutoscaler" $root)) }}
  enableServiceLinks: false
  terminationGracePeriodSeconds: {{ include "tandem.graceSeconds" $root }}
  {{- with .spec.priorityClassName }}
  priorityClassName: {{ . }}
  {{- end }}
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
    fsGroupChangePolicy: OnRootMismatch
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
  {{- if not .isHead }}
  {{- with $root.Values.topologySpread }}
  topologySpreadConstraints:
    {{- range . }}
    - {{ toYaml . | nindent 6 | trim }}
      labelSelector:
        matchLabels:
          {{- include "tandem.selector" $root | nindent 10 }}
          app.kubernetes.io/component: {{ $role }}
    {{- end }}
  {{- end }}
  {{- end }}
  containers:
    - name: {{ ternary "ray-head" "ray-worker" .isHead }}
      image: {{ include "tandem.image" $root }}
      imagePullPolicy: {{ $root.Values.image.pullPolicy }}
      securityContext:
        {{- include "tandem.confined" $root | nindent 8 }}
      env:
        {{- include "tandem.env" . | nindent 8 }}
      {{- include "tandem.contact" . | nindent 6 }}
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
        {{- if $root.Values.tenants.existingSecret }}
        - name: tenants # the folder, not a file of it: only so a changed Secret arrives
          mountPath: /etc/tandem/tenants
          readOnly: true
        {{- end }}
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
      {{- if $root.Values.models.existingClaim }}
      persistentVolumeClaim:
        claimName: {{ $root.Values.models.existingClaim }}
      {{- else if $root.Values.models.create.enabled }}
      persistentVolumeClaim:
        claimName: {{ include "tandem.fullname" $root }}-models
      {{- else }}
      emptyDir: {}
      {{- end }}
    {{- with $root.Values.tenants.existingSecret }}
    - name: tenants
      secret:
        secretName: {{ . }}
        items:
          - key: {{ $root.Values.tenants.key }}
            path: tenants.yaml
    {{- end }}
{{- end }}

{{- define "tandem.env" -}}
{{- $root := .root -}}
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
- name: TANDEM_CONTROL_RESOURCE # gateways run where the workers are, not on the head
  value: tandem_control
{{- if not $root.Values.gcsFaultTolerance.redisAddress }}
- name: TANDEM_SCHEDULER_RESOURCE # on the head, without which nothing lives; with Redis it outlives the head among the workers
  value: node:__internal_head__
{{- end }}
{{- if .isHead }}
- name: RAY_health_check_period_ms # a node that refuses connections is dead to Ray after 4 s, one that is silent after a minute
  value: "1000"
- name: RAY_health_check_timeout_ms
  value: "15000"
- name: RAY_health_check_failure_threshold
  value: "4"
{{- end }}
{{- with $root.Values.extraEnv }}
{{ toYaml . }}
{{- end }}
{{- end }}

{{/* Ports, probes, and how a pod says goodbye. A worker is ready when a token was produced here recently (R10). */}}
{{- define "tandem.contact" -}}
ports:
  {{- if .isHead }}
  - name: gcs
    containerPort: 6379
  - name: dashboard
    containerPort: 8265
  {{- end }}
  - name: serve
    containerPort: 8000
  - name: metrics
    containerPort: 8080
{{- if .isHead }}
startupProbe: {{- include "tandem.probe" (dict "path" "/api/gcs_healthz" "port" 8265 "period" 5 "failures" 60) | nindent 2 }}
readinessProbe: {{- include "tandem.probe" (dict "path" "/api/gcs_healthz" "port" 8265 "period" 5 "failures" 3) | nindent 2 }}
livenessProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 10 "failures" 12) | nindent 2 }}
{{- else }}
startupProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 5 "failures" 60) | nindent 2 }}
readinessProbe: {{- include "tandem.probe" (dict "path" "/ready" "port" 8000 "period" 5 "failures" 3) | nindent 2 }}
livenessProbe: {{- include "tandem.probe" (dict "path" "/api/healthz" "port" 52365 "period" 10 "failures" 12) | nindent 2 }}
lifecycle:
  preStop: # Ray is told that this node goes; what runs here ends, or goes on in another pod
    exec:
      command: [python, -m, cluster.leaving, {{ include "tandem.leaveSeconds" .root | quote }}]
{{- end }}
{{- end }}
