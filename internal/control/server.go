//go:build linux

// Package control is the interface on a service's Unix socket: HTTP with JSON, so that
//
//	curl --unix-socket /run/berth/web.sock http://berth/v1/status
//
// works. The interface is described in docs/control.md.
package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"time"

	"github.com/berth-net/berth/internal/supervisor"
	"github.com/berth-net/berth/internal/sys"
)

// RestartRequest is the body of POST /v1/restart. All fields may be missing, and the body too.
type RestartRequest struct {
	Command   []string `json:"command,omitempty"`   // replaces the service's for good
	Supersede bool     `json:"supersede,omitempty"` // end a restart that has not got to steering
	NoWait    bool     `json:"no_wait,omitempty"`   // answer once the new generation serves
}

// StopRequest is the body of POST /v1/stop.
type StopRequest struct {
	Force bool `json:"force,omitempty"` // kill at once, drain nothing
}

// Failure is the body of an answer that is no success.
type Failure struct {
	Error string `json:"error"`
	Hint  string `json:"hint,omitempty"`
}

// maxBody bounds a request's body.
const maxBody = 1 << 20

// Serve answers on the service's control socket until the service ends; then it lets the last answers leave.
func Serve(s *supervisor.Supervisor) (shutdown func()) {
	server := &http.Server{
		Handler:           handler(s),
		ReadHeaderTimeout: 10 * time.Second,
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			uid, err := sys.PeerUID(c.(*net.UnixConn))
			return context.WithValue(ctx, peerKey{}, peer{uid, err})
		},
	}
	go func() { _ = server.Serve(s.Control()) }()
	return func() {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_ = server.Shutdown(ctx)
	}
}

type peerKey struct{}

type peer struct {
	uid uint32
	err error
}

func handler(s *supervisor.Supervisor) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, r *http.Request) {
		st, err := s.Status(r.Context())
		if err != nil {
			refuse(w, http.StatusServiceUnavailable, err, "")
			return
		}
		answer(w, http.StatusOK, st)
	})
	mux.HandleFunc("POST /v1/restart", func(w http.ResponseWriter, r *http.Request) {
		var req RestartRequest
		if !read(w, r, &req) {
			return
		}
		if req.Command != nil {
			if len(req.Command) == 0 {
				refuse(w, http.StatusBadRequest, errors.New("the command is empty"), "")
				return
			}
			c := s.Config()
			if _, err := supervisor.FindCommand(req.Command[0], c.Dir, c.Env); err != nil {
				refuse(w, http.StatusBadRequest, err, "the service goes on as it was")
				return
			}
		}
		entry, err := s.Restart(r.Context(), req.Command, req.Supersede, !req.NoWait)
		switch {
		case err != nil:
			refuse(w, http.StatusServiceUnavailable, err, "")
		case entry.Error != "":
			answer(w, http.StatusConflict, entry)
		default:
			answer(w, http.StatusOK, entry)
		}
	})
	mux.HandleFunc("POST /v1/stop", func(w http.ResponseWriter, r *http.Request) {
		var req StopRequest
		if !read(w, r, &req) {
			return
		}
		if err := s.Stop(r.Context(), req.Force); err != nil {
			refuse(w, http.StatusServiceUnavailable, err, "")
			return
		}
		answer(w, http.StatusOK, struct{}{})
	})
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		refuse(w, http.StatusNotFound, fmt.Errorf("there is no %s %s", r.Method, r.URL.Path),
			"GET /v1/status, POST /v1/restart, POST /v1/stop")
	})
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		p, _ := r.Context().Value(peerKey{}).(peer)
		if p.err != nil || p.uid != 0 && int(p.uid) != os.Geteuid() {
			refuse(w, http.StatusForbidden, fmt.Errorf("uid %d may not control a service of uid %d", p.uid, os.Geteuid()), "")
			return
		}
		mux.ServeHTTP(w, r)
	})
}

func read(w http.ResponseWriter, r *http.Request, into any) bool {
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	if err := dec.Decode(into); err != nil && r.ContentLength != 0 {
		refuse(w, http.StatusBadRequest, fmt.Errorf("the request's body: %w", err), "see docs/control.md")
		return false
	}
	return true
}

func answer(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body)
}

func refuse(w http.ResponseWriter, status int, err error, hint string) {
	answer(w, status, Failure{Error: err.Error(), Hint: hint})
}
