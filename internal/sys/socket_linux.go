package sys

import (
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// Protocols that a listening stream socket can have.
const (
	ProtoTCP   = unix.IPPROTO_TCP
	ProtoMPTCP = unix.IPPROTO_MPTCP
)

// Address families of the Internet.
const (
	INET  = unix.AF_INET
	INET6 = unix.AF_INET6
)

// StreamSocket makes a TCP socket of the family, close-on-exec.
func StreamSocket(family int) (*os.File, error) {
	fd, err := unix.Socket(family, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, unix.IPPROTO_TCP)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	return os.NewFile(uintptr(fd), "tcp"), nil
}

// sockaddr is addr for a socket of the family; an IPv4 address becomes v4-mapped for an IPv6 socket.
func sockaddr(family int, addr netip.AddrPort) (unix.Sockaddr, error) {
	if family == unix.AF_INET {
		if !addr.Addr().Unmap().Is4() {
			return nil, unix.EAFNOSUPPORT
		}
		return &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().Unmap().As4()}, nil
	}
	sa := &unix.SockaddrInet6{Port: int(addr.Port()), Addr: addr.Addr().As16()}
	if zone := addr.Addr().Zone(); zone != "" {
		index, err := zoneIndex(zone)
		if err != nil {
			return nil, err
		}
		sa.ZoneId = index
	}
	return sa, nil
}

// zoneIndex is the interface index that a zone names, by number or by name.
func zoneIndex(zone string) (uint32, error) {
	var n uint32
	for i := range len(zone) {
		if zone[i] < '0' || zone[i] > '9' {
			req, err := unix.NewIfreq(zone)
			if err != nil {
				return 0, err
			}
			fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
			if err != nil {
				return 0, err
			}
			defer unix.Close(fd)
			if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
				return 0, err
			}
			return req.Uint32(), nil
		}
		n = n*10 + uint32(zone[i]-'0')
	}
	return n, nil
}

// Bind binds a socket of the family. The errno comes bare, for it is what a program gets to see.
func Bind(sock *os.File, family int, addr netip.AddrPort) error {
	sa, err := sockaddr(family, addr)
	if err != nil {
		return err
	}
	return control(sock, func(fd int) error { return unix.Bind(fd, sa) })
}

// ListenOn makes a bound socket listen, or changes the backlog of one that does. The errno comes bare.
func ListenOn(sock *os.File, backlog int) error {
	return control(sock, func(fd int) error { return unix.Listen(fd, backlog) })
}

// LocalAddr is where the socket is bound; the zero AddrPort if it is no Internet socket.
func LocalAddr(sock *os.File) (netip.AddrPort, error) {
	var addr netip.AddrPort
	err := control(sock, func(fd int) error {
		sa, err := unix.Getsockname(fd)
		if err != nil {
			return os.NewSyscallError("getsockname", err)
		}
		switch sa := sa.(type) {
		case *unix.SockaddrInet4:
			addr = netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port))
		case *unix.SockaddrInet6:
			ip := netip.AddrFrom16(sa.Addr)
			if sa.ZoneId != 0 {
				ip = ip.WithZone(itoa(sa.ZoneId))
			}
			addr = netip.AddrPortFrom(ip, uint16(sa.Port))
		}
		return nil
	})
	return addr, err
}

func itoa(n uint32) string {
	var b [10]byte
	i := len(b)
	for {
		i--
		b[i] = byte('0' + n%10)
		if n /= 10; n == 0 {
			return string(b[i:])
		}
	}
}

// Kind is what tells sockets apart before they are bound.
type Kind struct {
	Family    int    // INET, INET6 or another
	Type      int    // SOCK_STREAM …
	Protocol  int    // ProtoTCP, ProtoMPTCP or another
	V6Only    bool   // IPV6_V6ONLY
	Device    int    // SO_BINDTOIFINDEX, 0 for none
	Reuse     bool   // SO_REUSEPORT
	ReuseAddr bool   // SO_REUSEADDR
	Inode     uint64 // of the socket's file
	UID       uint32 // its owner, which the kernel's SO_REUSEPORT rule compares
	Listens   bool   // SO_ACCEPTCONN
}

// IsStream reports whether it is a TCP or MPTCP socket of IPv4 or IPv6.
func (k Kind) IsStream() bool {
	return (k.Family == INET || k.Family == INET6) && k.Type == unix.SOCK_STREAM &&
		(k.Protocol == ProtoTCP || k.Protocol == ProtoMPTCP)
}

// KindOf reads a socket's kind.
func KindOf(sock *os.File) (Kind, error) {
	var k Kind
	err := control(sock, func(fd int) error {
		get := func(level, name int) int {
			n, err := unix.GetsockoptInt(fd, level, name)
			if err != nil {
				return 0
			}
			return n
		}
		family, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_DOMAIN)
		if err != nil {
			return os.NewSyscallError("getsockopt SO_DOMAIN", err)
		}
		k.Family = family
		k.Type = get(unix.SOL_SOCKET, unix.SO_TYPE)
		k.Protocol = get(unix.SOL_SOCKET, unix.SO_PROTOCOL)
		k.Device = get(unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX)
		k.ReuseAddr = get(unix.SOL_SOCKET, unix.SO_REUSEADDR) != 0
		k.Reuse = get(unix.SOL_SOCKET, unix.SO_REUSEPORT) != 0
		k.Listens = get(unix.SOL_SOCKET, unix.SO_ACCEPTCONN) != 0
		if family == unix.AF_INET6 {
			k.V6Only = get(unix.IPPROTO_IPV6, unix.IPV6_V6ONLY) != 0
		}
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			return os.NewSyscallError("fstat", err)
		}
		k.Inode, k.UID = st.Ino, st.Uid
		return nil
	})
	return k, err
}

// SetReuseAddr, SetReusePort and SetV6Only set the flag of that name.
func SetReuseAddr(sock *os.File, on bool) error {
	return setBool(sock, unix.SOL_SOCKET, unix.SO_REUSEADDR, on, "SO_REUSEADDR")
}

// SetReusePort sets SO_REUSEPORT.
func SetReusePort(sock *os.File, on bool) error {
	return setBool(sock, unix.SOL_SOCKET, unix.SO_REUSEPORT, on, "SO_REUSEPORT")
}

// SetV6Only sets IPV6_V6ONLY.
func SetV6Only(sock *os.File, on bool) error {
	return setBool(sock, unix.IPPROTO_IPV6, unix.IPV6_V6ONLY, on, "IPV6_V6ONLY")
}

func setBool(sock *os.File, level, name int, on bool, what string) error {
	value := 0
	if on {
		value = 1
	}
	return control(sock, func(fd int) error {
		return os.NewSyscallError("setsockopt "+what, unix.SetsockoptInt(fd, level, name, value))
	})
}

// carried are the options that a program may set on a socket before bind and that its listener, and every connection accepted from it, keeps.
// SO_REUSEADDR and SO_REUSEPORT are not among them: they are the keeper's.
var carried = []struct{ level, name int }{
	{unix.SOL_SOCKET, unix.SO_KEEPALIVE}, {unix.SOL_SOCKET, unix.SO_LINGER}, {unix.SOL_SOCKET, unix.SO_OOBINLINE},
	{unix.SOL_SOCKET, unix.SO_PRIORITY}, {unix.SOL_SOCKET, unix.SO_MARK}, {unix.SOL_SOCKET, unix.SO_RCVLOWAT},
	{unix.SOL_SOCKET, unix.SO_RCVTIMEO}, {unix.SOL_SOCKET, unix.SO_SNDTIMEO}, {unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX},
	{unix.SOL_SOCKET, unix.SO_BUSY_POLL}, {unix.SOL_SOCKET, unix.SO_DONTROUTE},
	{unix.IPPROTO_TCP, unix.TCP_NODELAY}, {unix.IPPROTO_TCP, unix.TCP_KEEPIDLE}, {unix.IPPROTO_TCP, unix.TCP_KEEPINTVL},
	{unix.IPPROTO_TCP, unix.TCP_KEEPCNT}, {unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT}, {unix.IPPROTO_TCP, unix.TCP_FASTOPEN},
	{unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT}, {unix.IPPROTO_TCP, unix.TCP_CONGESTION}, {unix.IPPROTO_TCP, unix.TCP_LINGER2},
	{unix.IPPROTO_TCP, unix.TCP_SYNCNT}, {unix.IPPROTO_TCP, unix.TCP_WINDOW_CLAMP}, {unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT},
	{unix.IPPROTO_TCP, unix.TCP_SAVE_SYN},
	{unix.IPPROTO_IP, unix.IP_TOS}, {unix.IPPROTO_IP, unix.IP_TTL}, {unix.IPPROTO_IP, unix.IP_FREEBIND}, {unix.IPPROTO_IP, unix.IP_TRANSPARENT},
	{unix.IPPROTO_IPV6, unix.IPV6_V6ONLY}, {unix.IPPROTO_IPV6, unix.IPV6_TCLASS}, {unix.IPPROTO_IPV6, unix.IPV6_UNICAST_HOPS},
	{unix.IPPROTO_IPV6, unix.IPV6_FREEBIND}, {unix.IPPROTO_IPV6, unix.IPV6_TRANSPARENT},
}

// Carried reports whether an option is one of those that a socket put in another's place takes over.
func Carried(level, name int) bool {
	if level == unix.SOL_SOCKET && (name == unix.SO_RCVBUF || name == unix.SO_SNDBUF) {
		return true
	}
	for _, o := range carried {
		if o.level == level && o.name == name {
			return true
		}
	}
	return false
}

// CarryOptions gives to one socket the options that differ on another, as far as the kernel lets it.
func CarryOptions(to, from *os.File) error {
	return control(to, func(to int) error {
		return control(from, func(from int) error {
			for _, o := range carried {
				want, err := unix.GetsockoptString(from, o.level, o.name)
				if err != nil {
					continue
				}
				if have, err := unix.GetsockoptString(to, o.level, o.name); err != nil || have == want {
					continue
				}
				// One that the kernel refuses to a plain TCP socket stays at its default.
				_ = unix.SetsockoptString(to, o.level, o.name, want)
			}
			for _, name := range []int{unix.SO_RCVBUF, unix.SO_SNDBUF} {
				want, err1 := unix.GetsockoptInt(from, unix.SOL_SOCKET, name)
				have, err2 := unix.GetsockoptInt(to, unix.SOL_SOCKET, name)
				if err1 == nil && err2 == nil && want != have {
					// The kernel doubles what it is given (socket(7)).
					_ = unix.SetsockoptInt(to, unix.SOL_SOCKET, name, want/2)
				}
			}
			return nil
		})
	})
}

// SetOption sets an option by its raw value.
func SetOption(sock *os.File, level, name int, value []byte) error {
	return control(sock, func(fd int) error {
		return os.NewSyscallError("setsockopt", unix.SetsockoptString(fd, level, name, string(value)))
	})
}

// Chown gives the socket's file to a user: SO_REUSEPORT compares that owner.
func Chown(sock *os.File, uid uint32) error {
	return control(sock, func(fd int) error { return os.NewSyscallError("fchown", unix.Fchown(fd, int(uid), -1)) })
}

// Queue is how many connections wait on a listener and how many may (TCP_INFO's tcpi_unacked and tcpi_sacked, net/ipv4/tcp.c).
func Queue(sock *os.File) (waiting, limit int, err error) {
	err = control(sock, func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.IPPROTO_TCP, unix.TCP_INFO)
		if err != nil {
			return os.NewSyscallError("getsockopt TCP_INFO", err)
		}
		waiting, limit = int(info.Unacked), int(info.Sacked)
		return nil
	})
	return waiting, limit, err
}

// Unreach lets a listener take no new connection, while handshakes under way finish and what waits is kept: it is bound
// to an interface that does not exist, so that no SYN finds it (compute_score, net/ipv4/inet_hashtables.c), and one that no other
// listener takes is refused. Linux does not look whether the interface exists (sock_bindtoindex, net/core/sock.c); it
// needs CAP_NET_RAW only where the socket is bound to one already.
func Unreach(sock *os.File) error {
	return control(sock, func(fd int) error {
		return os.NewSyscallError("setsockopt SO_BINDTOIFINDEX", unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BINDTOIFINDEX, 1<<31-1))
	})
}

// control runs f with the descriptor, which stays open meanwhile and keeps its blocking mode (File.Fd would change it).
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}

// Errno is the errno behind err: 0 for no error, EIO for an error that has none.
func Errno(err error) syscall.Errno {
	if err == nil {
		return 0
	}
	for err != nil {
		if e, ok := err.(syscall.Errno); ok {
			return e
		}
		u, ok := err.(interface{ Unwrap() error })
		if !ok {
			break
		}
		err = u.Unwrap()
	}
	return syscall.EIO
}

// Duplicate is another descriptor of the same file, close-on-exec.
func Duplicate(f *os.File) (*os.File, error) {
	var dup *os.File
	err := control(f, func(fd int) error {
		n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return os.NewSyscallError("fcntl F_DUPFD_CLOEXEC", err)
		}
		dup, err = NewFile(n, f.Name())
		return err
	})
	return dup, err
}

// StopListening takes a socket out of LISTEN, whoever else has it.
func StopListening(sock *os.File) error {
	return control(sock, func(fd int) error { return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_RD)) })
}

// IsReusePort reports whether an option is SO_REUSEPORT.
func IsReusePort(level, name int) bool { return level == unix.SOL_SOCKET && name == unix.SO_REUSEPORT }

// IsReuseAddr reports whether an option is SO_REUSEADDR.
func IsReuseAddr(level, name int) bool { return level == unix.SOL_SOCKET && name == unix.SO_REUSEADDR }

// StopTalking shuts a socket down both ways: its peer meets an end of file, and so does whoever reads it here.
func StopTalking(sock *os.File) error {
	return control(sock, func(fd int) error { return os.NewSyscallError("shutdown", unix.Shutdown(fd, unix.SHUT_RDWR)) })
}

// DeferAccept sets TCP_DEFER_ACCEPT, in seconds, and returns what it was.
func DeferAccept(sock *os.File, seconds int) (was int, err error) {
	err = control(sock, func(fd int) error {
		if was, err = unix.GetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT); err != nil {
			return os.NewSyscallError("getsockopt TCP_DEFER_ACCEPT", err)
		}
		if was == seconds {
			return nil
		}
		return os.NewSyscallError("setsockopt TCP_DEFER_ACCEPT", unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_DEFER_ACCEPT, seconds))
	})
	return was, err
}

// Zone is the number of the interface that a zone names, as an address has it that the kernel gives.
func Zone(name string) (string, error) {
	index, err := zoneIndex(name)
	return itoa(index), err
}
