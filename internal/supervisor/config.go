//go:build linux

package supervisor

import (
	"time"

	"github.com/berth-net/berth/internal/keeper"
)

// Config is a service as `berth run` was told it; every field has been checked.
type Config struct {
	Name         string        `json:"name"`
	Control      string        `json:"control"` // the control socket's path
	Command      []string      `json:"command"`
	Listen       []Address     `json:"listen,omitempty"`
	Ready        Readiness     `json:"ready"`
	ReadyTimeout time.Duration `json:"ready_timeout"`
	DrainTimeout time.Duration `json:"drain_timeout"`
	Quiet        time.Duration `json:"quiet"`
	KeepIdle     bool          `json:"keep_idle,omitempty"`
	StopSignal   int           `json:"stop_signal"`
	KillAfter    time.Duration `json:"kill_after"`
	Dir          string        `json:"dir,omitempty"`
	Env          []string      `json:"env,omitempty"`
	FDs          bool          `json:"fds,omitempty"` // hand listeners over as LISTEN_FDS
	Log          string        `json:"log"`           // text or json
}

// Address is one address that is open from the first moment.
type Address struct {
	Name string      `json:"name,omitempty"`
	Form keeper.Form `json:"form"`
}

// Readiness is how a candidate proves that it can serve.
type Readiness struct {
	Kind    string   `json:"kind"`              // tcp, notify, http, exec
	URL     string   `json:"url,omitempty"`     // of http
	Command []string `json:"command,omitempty"` // of exec
}

// String is the readiness as the flag takes it.
func (r Readiness) String() string {
	switch r.Kind {
	case "http":
		return r.URL
	case "exec":
		s := "exec:"
		for i, arg := range r.Command {
			if i > 0 {
				s += " "
			}
			s += arg
		}
		return s
	}
	return r.Kind
}
