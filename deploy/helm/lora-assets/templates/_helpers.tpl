{{- define "h2o-gateway.name" -}}
{{- printf "%s-h2o-gateway" .Release.Name | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "h2o-gateway.selector" -}}
app.kubernetes.io/name: h2o-gateway
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "h2o-gateway.labels" -}}
{{ include "h2o-gateway.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lora-assets.labels" -}}
app.kubernetes.io/name: lora-assets
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "lora-assets.pod-security" -}}
runAsNonRoot: true
runAsUser: 1000
runAsGroup: 1000
fsGroup: 1000
fsGroupChangePolicy: OnRootMismatch
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "lora-assets.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "lora-assets.env-from" -}}
- configMapRef:
    name: lora-assets
- secretRef:
    name: lora-assets
{{- end -}}
