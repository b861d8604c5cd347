{{- define "conserve.name" -}}
{{- printf "%s-conserve" .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- end -}}

{{- define "conserve.labels" -}}
app.kubernetes.io/name: conserve-broker
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}
