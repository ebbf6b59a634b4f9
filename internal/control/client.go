//go:build linux

package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"

	"github.com/berth-net/berth/internal/supervisor"
)

// Client speaks to one service.
type Client struct {
	path string
	http *http.Client
}

// Dial makes a client for the service with that control socket. A socket of another user's is refused: it could be anybody's.
func Dial(path string) (*Client, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	if info.Mode()&os.ModeSocket == 0 {
		return nil, fmt.Errorf("control socket: %s is no socket", path)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; int(owner) != os.Geteuid() && os.Geteuid() != 0 {
		return nil, fmt.Errorf("control socket: %s belongs to uid %d, not to uid %d", path, owner, os.Geteuid())
	}
	c := &Client{path: path}
	c.http = &http.Client{Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", path)
		},
	}}
	return c, nil
}

// Path is the control socket's.
func (c *Client) Path() string { return c.path }

// Status asks how the service is.
func (c *Client) Status(ctx context.Context) (supervisor.Status, error) {
	var st supervisor.Status
	err := c.call(ctx, http.MethodGet, "/v1/status", nil, &st)
	return st, err
}

// Restart asks for a new generation. A restart that failed is an entry with an error, not an error.
func (c *Client) Restart(ctx context.Context, r RestartRequest) (supervisor.Entry, error) {
	var e supervisor.Entry
	err := c.call(ctx, http.MethodPost, "/v1/restart", r, &e)
	return e, err
}

// Stop ends the service and returns when all is gone.
func (c *Client) Stop(ctx context.Context, r StopRequest) error {
	return c.call(ctx, http.MethodPost, "/v1/stop", r, &struct{}{})
}

func (c *Client) call(ctx context.Context, method, path string, body, result any) error {
	var reader io.Reader
	if body != nil {
		data, err := json.Marshal(body)
		if err != nil {
			return err
		}
		reader = bytes.NewReader(data)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://berth"+path, reader)
	if err != nil {
		return err
	}
	resp, err := c.http.Do(req)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return fmt.Errorf("nobody answers on %s: that berth has ended", c.path)
	}
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode == http.StatusOK || resp.StatusCode == http.StatusConflict {
		if err := json.NewDecoder(resp.Body).Decode(result); err != nil {
			return fmt.Errorf("the answer of %s: %w", c.path, err)
		}
		return nil
	}
	var f Failure
	if err := json.NewDecoder(resp.Body).Decode(&f); err != nil || f.Error == "" {
		return fmt.Errorf("%s answers %s", c.path, resp.Status)
	}
	return &supervisor.HintError{Err: errors.New(f.Error), Text: f.Hint}
}

// RunDir is where control sockets lie by default: /run/berth for root, else a folder of the user's own.
func RunDir() string {
	if os.Geteuid() == 0 {
		return "/run/berth"
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		return filepath.Join(dir, "berth")
	}
	return filepath.Join(os.TempDir(), fmt.Sprintf("berth-%d", os.Getuid()))
}

// Socket is the default control socket of a name.
func Socket(name string) string { return filepath.Join(RunDir(), name+".sock") }

// Names lists the services of this user that run.
func Names() []string {
	paths, _ := filepath.Glob(Socket("*"))
	var names []string
	for _, path := range paths {
		conn, err := net.Dial("unix", path)
		if err != nil {
			continue
		}
		conn.Close()
		names = append(names, strings.TrimSuffix(filepath.Base(path), ".sock"))
	}
	sort.Strings(names)
	return names
}
