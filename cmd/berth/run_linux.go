package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/shlex"
	"github.com/spf13/cobra"

	"github.com/berth-net/berth/internal/control"
	"github.com/berth-net/berth/internal/drain"
	"github.com/berth-net/berth/internal/keeper"
	"github.com/berth-net/berth/internal/supervisor"
	"github.com/berth-net/berth/internal/sys"
)

type runFlags struct {
	listen                                []string
	name, control, ready, signal, dir     string
	readyTimeout, drainTimeout, killAfter time.Duration
	quiet                                 time.Duration
	env                                   []string
	fds, keepIdle                         bool
	log                                   string
}

func newRunCommand() *cobra.Command {
	var f runFlags
	cmd := &cobra.Command{
		Use:   "run [flags] -- COMMAND [ARG…]",
		Short: "Hold the port and run a program on it",
		Long: `Run a program in the foreground and hold every TCP port that it listens on. "berth restart" then starts the program
again: new connections go to the new one once it is ready, the old one is stopped when nothing is in flight on it, and if the
new one fails, the old one never noticed. If the program dies, connections wait until it is there again.

With --listen the port is open from the first moment: connections wait until the program is ready.

SIGHUP restarts; SIGTERM and SIGINT drain and end; a second one ends at once.`,
		Example: `  berth run -- python3 -m http.server 8080
  berth run --listen :8080 --ready http://:8080/health -- java -jar app.jar
  berth run --listen web=0.0.0.0:80 --listen admin=127.0.0.1:9000 --fds -- ./server`,
		DisableFlagsInUseLine: true,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usage("berth run [flags] -- COMMAND [ARG…]", "there is no command to run")
			}
			return nil
		},
		RunE: func(_ *cobra.Command, args []string) error { return runService(f, args) },
	}
	fl := cmd.Flags()
	fl.SetInterspersed(false)
	fl.StringArrayVar(&f.listen, "listen", nil, "open `[NAME=]ADDR` from the first moment: 8080, :8080, 127.0.0.1:8080, [::1]:8080, tcp://…; repeatable")
	fl.StringVar(&f.name, "name", "", "the service's `NAME` (default: the command's)")
	fl.StringVar(&f.control, "control", "", "`PATH` of the control socket (default: NAME.sock in "+control.RunDir()+")")
	fl.StringVar(&f.ready, "ready", "tcp", "when a start is ready: `tcp` (it accepts a connection), notify (it sends READY=1), http://:PORT/PATH (it answers 200 to 399), exec:COMMAND (exit status 0; the start alone is at $BERTH_READY_ADDR)")
	fl.DurationVar(&f.readyTimeout, "ready-timeout", time.Minute, "how long a start may take to be ready")
	fl.DurationVar(&f.drainTimeout, "drain-timeout", 30*time.Second, "how long the old one's connections may take to end; what is left is cut and counted")
	fl.DurationVar(&f.quiet, "quiet", drain.DefaultQuiet, "a kept-alive connection is idle after this time without a byte")
	fl.BoolVar(&f.keepIdle, "keep-idle", false, "leave idle kept-alive connections alone until --drain-timeout")
	fl.StringVar(&f.signal, "stop-signal", "TERM", "`SIGNAL` that stops the program")
	fl.DurationVar(&f.killAfter, "kill-after", 10*time.Second, "how long after the stop signal all that is left of it is killed")
	fl.StringVar(&f.dir, "dir", "", "`FOLDER` to run the program in")
	fl.StringArrayVar(&f.env, "env", nil, "`NAME=VALUE` to add to the program's environment; repeatable")
	fl.BoolVar(&f.fds, "fds", false, "hand the --listen addresses over as LISTEN_FDS, for a program that takes them (systemd socket activation)")
	fl.StringVar(&f.log, "log", "text", "berth's own log on standard error: `text` or json")
	return cmd
}

func runService(f runFlags, command []string) error {
	config, err := f.config(command)
	if err != nil {
		return err
	}
	socket, lock, err := openControl(&config)
	if err != nil {
		return err
	}
	defer os.Remove(lock.Name())
	defer os.Remove(config.Control)
	service, err := json.Marshal(config)
	if err != nil {
		return err
	}
	var declared []keeper.Form
	for _, a := range config.Listen {
		declared = append(declared, a.Form)
	}
	status, err := keeper.Run(keeper.Config{
		Service: service, Name: config.Name, Control: socket, Declared: declared, Log: supervisor.NewLogger(config.Log),
	})
	if err != nil {
		return failed(err, "")
	}
	if status != 0 {
		return &failure{errors.New(""), "", status}
	}
	return nil
}

// config checks all that can be checked before anything is opened or started.
func (f runFlags) config(command []string) (supervisor.Config, error) {
	c := supervisor.Config{
		Name: f.name, Control: f.control, Command: command, ReadyTimeout: f.readyTimeout, DrainTimeout: f.drainTimeout, Quiet: f.quiet,
		KeepIdle: f.keepIdle, KillAfter: f.killAfter, Dir: f.dir, Env: f.env, FDs: f.fds, Log: f.log,
	}
	if c.Name == "" {
		c.Name = filepath.Base(command[0])
		if checkName(c.Name) != nil {
			return c, usage("give it one with --name NAME", "the command's name, %q, can't be a service's", c.Name)
		}
	}
	if err := checkName(c.Name); err != nil {
		return c, err
	}
	for _, d := range []struct {
		flag  string
		value time.Duration
		least time.Duration
	}{{"ready-timeout", f.readyTimeout, 1}, {"drain-timeout", f.drainTimeout, 0}, {"kill-after", f.killAfter, 0}, {"quiet", f.quiet, 1}} {
		if d.value < d.least {
			return c, usage("give a time such as 500ms, 10s or 2m", "--%s %s is too short", d.flag, d.value)
		}
	}
	if c.Log != "text" && c.Log != "json" {
		return c, usage("text or json", "--log %q is no format", c.Log)
	}
	for _, kv := range f.env {
		if name, _, ok := strings.Cut(kv, "="); !ok || name == "" {
			return c, usage("write --env NAME=VALUE", "--env %q has no name or no value", kv)
		}
	}
	if c.Dir != "" {
		abs, err := filepath.Abs(c.Dir)
		if err != nil {
			return c, failed(err, "")
		}
		if info, err := os.Stat(abs); err != nil || !info.IsDir() {
			return c, usage("", "--dir %s is no folder", c.Dir)
		}
		c.Dir = abs
	}
	if _, err := supervisor.FindCommand(command[0], c.Dir, c.Env); err != nil {
		hint := "give the path of an executable file"
		if errors.Is(err, fs.ErrNotExist) {
			hint = "check its spelling, or give its path"
		}
		return c, failed(err, hint)
	}
	var err error
	if c.StopSignal, err = parseSignal(f.signal); err != nil {
		return c, err
	}
	if c.Ready, err = parseReady(f.ready); err != nil {
		return c, err
	}
	if c.Ready.Kind == "exec" {
		if _, err := supervisor.FindCommand(c.Ready.Command[0], c.Dir, c.Env); err != nil {
			return c, failed(fmt.Errorf("--ready: %w", err), "")
		}
	}
	for _, l := range f.listen {
		a, err := parseAddress(l)
		if err != nil {
			return c, err
		}
		for _, other := range c.Listen {
			if other.Form == a.Form || other.Name != "" && other.Name == a.Name {
				return c, usage("", "--listen %s is given twice", l)
			}
		}
		c.Listen = append(c.Listen, a)
	}
	if c.FDs && len(c.Listen) == 0 {
		return c, usage("add --listen ADDR", "--fds has no listener to hand over")
	}
	return c, nil
}

// parseAddress reads [NAME=]ADDR. Without a host it is every address of the machine, of IPv6 and IPv4.
func parseAddress(s string) (supervisor.Address, error) {
	var a supervisor.Address
	const hint = "write 8080, :8080, 127.0.0.1:8080, [::1]:8080, tcp://HOST:PORT or NAME=ADDR"
	bad := func(why string) (supervisor.Address, error) {
		return a, usage(hint, "--listen %q: %s", s, why)
	}
	addr := s
	if name, rest, ok := strings.Cut(s, "="); ok {
		if name == "" || strings.ContainsAny(name, ":[]/") {
			return bad("the name is empty or has a character that LISTEN_FDNAMES can't have")
		}
		a.Name, addr = name, rest
	}
	if scheme, rest, ok := strings.Cut(addr, "://"); ok {
		if scheme != "tcp" {
			return bad("only tcp can be held")
		}
		addr = rest
	}
	host, port := "", addr
	if strings.Contains(addr, ":") {
		var err error
		if host, port, err = net.SplitHostPort(addr); err != nil {
			return bad("it is no address with a port")
		}
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil || n == 0 {
		return bad(fmt.Sprintf("%q is no port from 1 to 65535", port))
	}
	ip := netip.IPv6Unspecified()
	switch {
	case host == "*":
	case host == "" && !sys.HasIPv6():
		ip = netip.IPv4Unspecified()
	case host == "localhost":
		ip = netip.AddrFrom4([4]byte{127, 0, 0, 1})
	case host != "":
		if ip, err = netip.ParseAddr(host); err != nil {
			return bad(fmt.Sprintf("%q is no IP address", host))
		}
	}
	if ip.Zone() != "" {
		zone, err := sys.Zone(ip.Zone())
		if err != nil {
			return bad(fmt.Sprintf("there is no interface %q", ip.Zone()))
		}
		ip = ip.WithZone(zone)
	}
	a.Form = keeper.Form{Addr: netip.AddrPortFrom(ip, uint16(n))}
	return a, nil
}

func parseSignal(s string) (int, error) {
	name := strings.TrimPrefix(strings.ToUpper(s), "SIG")
	if n, err := strconv.Atoi(name); err == nil && n > 0 && n < 65 {
		return n, nil
	}
	if n := sys.SignalNumber("SIG" + name); n != 0 {
		return int(n), nil
	}
	return 0, usage("a name such as TERM, INT or QUIT, or a number", "--stop-signal %q is no signal", s)
}

func parseReady(s string) (supervisor.Readiness, error) {
	const hint = "tcp, notify, http://:PORT/PATH or exec:COMMAND"
	switch {
	case s == "tcp" || s == "notify":
		return supervisor.Readiness{Kind: s}, nil
	case strings.HasPrefix(s, "http://"):
		u, err := url.Parse(s)
		if err != nil {
			return supervisor.Readiness{}, usage(hint, "--ready %q: %v", s, err)
		}
		if p := u.Port(); p != "" {
			if n, err := strconv.ParseUint(p, 10, 16); err != nil || n == 0 {
				return supervisor.Readiness{}, usage(hint, "--ready %q: %q is no port", s, p)
			}
		}
		return supervisor.Readiness{Kind: "http", URL: s}, nil
	case strings.HasPrefix(s, "exec:"):
		command, err := shlex.Split(strings.TrimPrefix(s, "exec:"))
		if err != nil || len(command) == 0 {
			return supervisor.Readiness{}, usage(hint, "--ready %q has no command", s)
		}
		return supervisor.Readiness{Kind: "exec", Command: command}, nil
	}
	return supervisor.Readiness{}, usage(hint, "--ready %q is no way to be ready", s)
}

// openControl makes the control socket and the lock that keeps the name. Whoever has the lock owns the socket's path.
func openControl(c *supervisor.Config) (socket, lock *os.File, err error) {
	if c.Control == "" {
		dir := control.RunDir()
		mode := os.FileMode(0o700)
		if os.Geteuid() == 0 {
			mode = 0o755
		}
		if err := os.MkdirAll(dir, mode); err != nil {
			return nil, nil, failed(fmt.Errorf("the folder of the control sockets can't be made: %w", err), "choose another place with --control PATH")
		}
		if info, err := os.Stat(dir); err == nil && int(info.Sys().(*syscall.Stat_t).Uid) != os.Geteuid() {
			return nil, nil, failed(fmt.Errorf("the folder of the control sockets, %s, belongs to uid %d", dir, info.Sys().(*syscall.Stat_t).Uid),
				"choose another place with --control PATH")
		}
		c.Control = control.Socket(c.Name)
	}
	if c.Control, err = filepath.Abs(c.Control); err != nil {
		return nil, nil, failed(err, "")
	}
	if len(c.Control) > 88 {
		return nil, nil, failed(fmt.Errorf("the control socket's path %s is longer than 88 bytes", c.Control), "choose a shorter one with --control PATH")
	}
	if info, err := os.Lstat(c.Control); err == nil {
		if info.Mode()&os.ModeSocket == 0 {
			return nil, nil, failed(fmt.Errorf("%s is in the way of the control socket", c.Control), "choose another place with --control PATH")
		}
		if uid := info.Sys().(*syscall.Stat_t).Uid; int(uid) != os.Geteuid() {
			return nil, nil, failed(fmt.Errorf("the control socket %s belongs to uid %d", c.Control, uid), "choose another --name or --control PATH")
		}
	}
	lock, err = os.OpenFile(strings.TrimSuffix(c.Control, ".sock")+".lock", os.O_RDWR|os.O_CREATE|syscall.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, failed(fmt.Errorf("the control socket can't be created: %w", err), "choose another place with --control PATH")
	}
	got, err := sys.LockFile(lock)
	if err == nil && !got {
		err = &failure{fmt.Errorf("a service with the name %s runs already (control socket %s)", c.Name, c.Control), "choose another with --name, or restart that one with `berth restart " + c.Name + "`", exitFailed}
	}
	if err != nil {
		lock.Close()
		return nil, nil, err
	}
	_ = os.Remove(c.Control) // left by one that was killed
	old := syscall.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: c.Control, Net: "unix"})
	syscall.Umask(old)
	if err != nil {
		os.Remove(lock.Name())
		lock.Close()
		return nil, nil, failed(fmt.Errorf("the control socket can't be created: %w", err), "choose another place with --control PATH")
	}
	l.SetUnlinkOnClose(false)
	defer l.Close()
	if socket, err = l.File(); err != nil {
		return nil, nil, failed(err, "")
	}
	return socket, lock, nil
}
