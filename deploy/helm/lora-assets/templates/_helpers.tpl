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
